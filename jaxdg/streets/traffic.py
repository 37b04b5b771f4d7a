"""The vehicles, people, lamps, signs and traffic lights of a generated street.

Vehicles longer than a car are drawn in slices, each with its own painter's key. They bend with the
road, and things beside them are hidden by the right half.
"""

import math

import numpy as np

from jaxdg.streets import paints, shapes
from jaxdg.streets.ground import LIGHT, POLE, ROAD, SIGN
from jaxdg.streets.place import Place

PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(11, 19)  # Cityscapes train ids
LENGTH = {CAR: 4.6, BUS: 12.0, TRUCK: 9.2, BICYCLE: 1.9, MOTORCYCLE: 2.2}  # metres


class Street(Place):
    """A place with everything that moves or stands in it; see `Place` for its attributes."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.models = shapes.models()
        self.taken: list[tuple[float, float, float]] = []  # s0, s1, t of what stands on the road
        self._trains()
        self._traffic()
        if self.crossing and self.chance(0.65):
            self._side_street(*self.crossing)
        for side in (-1, 1):
            self._furniture(side)
            self._pavement_life(side)
        self._crossers()

    def free(self, s0, s1, t, margin=1.0) -> bool:
        """Claims a stretch of the road; false if something stands there."""
        for a, b, other in self.taken:
            if abs(t - other) < 1.9 and s0 - margin < b and a < s1 + margin:
                return False
        self.taken.append((s0, s1, t))
        return True

    def _slices(self, label, count=0):
        """Shapes of a long vehicle from tail to head, their length in metres, and its colours."""
        models = self.models
        pick = self.pick
        if label == BUS:
            plain, wheels, door = models["bus"]
            doors = pick([door, plain])
            body = self.tint(pick(paints.BUS_PAINT))
            palette = self.palette(BODY=body, TRIM=self.tint(pick(paints.BUS_TRIM)))
            return [doors, wheels, plain, wheels, doors], 2.4, palette
        if label == TRUCK:
            body = self.tint(pick(paints.CAR_PAINT))
            palette = self.palette(BODY=body, TRIM=self.tint(pick(paints.LOAD_PAINT)))
            return [pick(models["load"])] * 3 + models["cab"], 2.3, palette
        plain, door = models["train"]
        body, stripe = pick(paints.TRAIN_PAINT)
        palette = self.palette(BODY=self.tint(body, 0.04), TRIM=self.tint(stripe, 0.04))
        return [door if i % 3 == 1 else plain for i in range(count)], 3.0, palette

    def _long_vehicle(self, label, pose, count=0):
        """Adds a vehicle in slices.

        `pose` maps metres from its tail and its length to x, y, heading and painter's key.
        """
        pieces, length, palette = self._slices(label, count)
        obj = self.mesh.object(label)
        for i, piece in enumerate(pieces):
            x, y, heading, key = pose(length * (i + 0.5), length * len(pieces))
            self.mesh.place(piece, palette, (x, y), heading, label, key, obj)
            self.solid_shadow(x, y, heading, 1.25, length, 3.2)

    def _along(self, s, t, ahead):
        """The pose of a vehicle in lane t whose near end is at s."""
        turn = 0 if ahead else math.pi

        def pose(d, total):
            middle = s + d if ahead else s + total - d
            return *self.road.at(middle, t), self.road.heading(middle) + turn, middle

        return pose

    def _athwart(self, s, t, toward):
        """The pose of a vehicle that crosses at s with its tail at t; outer slices are farther."""
        heading = self.road.heading(s) + toward * math.pi / 2

        def pose(d, total):
            across = t + toward * d
            return *self.road.at(s, across), heading, s + 0.002 * abs(across)

        return pose

    def _vehicle(self, label, s, t, ahead) -> bool:
        """Puts a vehicle with its near end at s on lane t; false if there is no room."""
        length = LENGTH[label]
        if not self.free(s, s + length, t):
            return False
        middle = s + length / 2
        heading = self.road.heading(middle) + (0 if ahead else math.pi)
        if label == CAR:
            self._car(*self.road.at(middle, t), heading + self.rng.normal(0, 0.02), middle)
        elif label in (BUS, TRUCK):
            self._long_vehicle(label, self._along(s, t, ahead))
        else:
            self._two_wheeler(label, middle, t, heading, ridden=True)
        return True

    def _car(self, x, y, heading, key):
        paint = self.pick(paints.CAR_PAINT if self.chance(0.6) else paints.CAR_PAINT[:4])
        palette = self.palette(BODY=self.tint(paint, 0.08))
        scale = (1, 1, self.rng.uniform(0.96, 1.06))
        shape = self.pick(self.models["car"])
        self.mesh.place(shape, palette, (x, y), heading, CAR, key, self.mesh.object(CAR), scale)
        self.solid_shadow(x, y, heading, 0.88, 4.3, 1.2)

    def _two_wheeler(self, label, s, t, heading, ridden):
        """A bicycle or motorcycle, drawn from the side or the end that the camera sees more of."""
        x, y = self.road.at(s, t)
        sight = heading - math.atan2(x - self.camera.position[0], y - self.camera.position[1])
        view = 0 if abs(math.sin(sight)) > 0.5 else (2 if math.cos(sight) > 0 else 1)
        turn = heading if view == 0 else self.camera.yaw
        bicycle = label == BICYCLE
        place = self.mesh.place
        body = self.tint(self.pick(paints.WEAR if bicycle else paints.CAR_PAINT), 0.1)
        palette = self.palette(BODY=body, HUB=[0.3 if bicycle else 0.5] * 3)
        model = self.models["bicycle" if bicycle else "motorcycle"][view]
        obj = self.mesh.object(label)
        place(model, palette, (x, y), turn, label, s, obj, (1.1, 1.05, 1.05))
        if ridden:
            top = self.tint(self.pick(paints.WEAR), 0.1)
            legs = self.tint(self.pick(paints.WEAR), 0.05, 0.7)
            skin = self.pick(paints.SKIN_TONES)
            helmet = self.tint(self.pick(paints.HELMETS))
            palette = self.palette(TOP=top, LEGS=legs, SKIN=skin, HAIR=helmet)
            model = self.models["rider"][view if view or bicycle else 3]
            obj = self.mesh.object(RIDER)
            scale = (1.15, 1, self.rng.uniform(1.0, 1.1))
            place(model, palette, (x, y), turn, RIDER, s - 0.01, obj, scale)
        self.solid_shadow(x, y, heading, 0.25, 1.8, 1.6 if ridden else 0.9)

    def _traffic(self):
        """Adds near vehicles of the rare classes, then traffic in each lane, then parked rows."""
        rng = self.rng
        limit = min(75.0, self.far - 3)
        own = min((abs(t - self.camera.position[0]), t) for t, ahead in self.lanes if ahead)[1]
        shares = ((BUS, 0.38), (TRUCK, 0.40), (MOTORCYCLE, 0.36), (BICYCLE, 0.32))
        for label in [label for label, p in shares if self.chance(p)]:
            nearest, farthest = (1.5, 24.0) if label in (BUS, TRUCK) else (5.0, 14.0)
            for _ in range(4):
                t, ahead = self.pick(self.lanes)
                s = rng.uniform(max(nearest, 9.0) if t == own else nearest, farthest)
                if self._vehicle(label, s, t + rng.normal(0, 0.15), ahead):
                    break
        for t, ahead in self.lanes:
            s = rng.uniform(8 if t == own else 3, 28)
            gap = rng.uniform(6, 30)
            while s < limit:
                label = self.pick([CAR] * 12 + [TRUCK, BUS, MOTORCYCLE, BICYCLE])
                self._vehicle(label, s, t + rng.normal(0, 0.2), ahead)
                s += 6 + rng.exponential(gap)
        for side in (-1, 1):
            if self.parking[side]:
                self._parked(side, min(limit, 60))

    def _parked(self, side, limit):
        rng = self.rng
        t = side * (self.half + self.parking[side] / 2 + 0.05)
        ahead = side == self.drive
        s = rng.uniform(2, 8)
        full = rng.uniform(0.35, 0.95)
        while s < limit:
            inside = self.crossing and self.crossing[0] - 7 < s < self.crossing[1] + 2
            if not inside and self.chance(full):
                label = self.pick([CAR] * 10 + [TRUCK, BUS])
                lane = t + rng.normal(0, 0.08)
                self._vehicle(label, s, lane, ahead != self.chance(0.1))
            s += rng.uniform(5.2, 6.5)

    def _side_street(self, s0, s1):
        """Vehicles that cross ahead, seen from their sides, unless a train crosses."""
        rng = self.rng
        for share, toward in ((0.3, 1), (0.72, -1)):
            s = s0 + (s1 - s0) * share
            t = rng.uniform(-16, 6)
            if any(lane == math.inf for _, _, lane in self.taken):
                continue
            for _ in range(rng.integer(0, 3)):
                label = self.pick([CAR, CAR, BUS, TRUCK, TRUCK])
                if label == CAR:
                    self._car(*self.road.at(s, t), self.road.heading(s) + toward * math.pi / 2, s)
                else:
                    self._long_vehicle(
                        label, self._athwart(s, t - toward * LENGTH[label] / 2, toward)
                    )
                t += 9 if label == CAR else 16

    def _trains(self):
        """A train on the railway, a tram in the street, or one that crosses ahead."""
        rng = self.rng
        if self.rails:
            if self.chance(0.85):
                t = self.rails * (self.front(self.rails) + 2.7)
                s = rng.uniform(1, 14)
                stop = (self.crossing[0] if self.crossing else self.far) - 1
                count = min(rng.integer(6, 13), int((stop - s) / 3))
                if count > 1:
                    self._long_vehicle(TRAIN, self._along(s, t, self.chance(0.5)), count)
        elif self.chance(0.22):
            t, ahead = self.pick(self.lanes)
            for k in (-0.75, 0.70):
                self.ground(
                    self.road.strip(t + k, t + k + 0.09, -8, self.far), paints.RAIL, ROAD, 6.5
                )
            s = rng.uniform(7, 22)
            count = rng.integer(4, 10)
            if self.free(s, s + 3 * count, t, 2):
                self._long_vehicle(TRAIN, self._along(s, t, ahead), count)
        elif self.crossing and self.chance(0.35):
            s = sum(self.crossing) / 2
            for k in (-0.75, 0.70):
                self.ground(self.across(s + k, s + k + 0.1, -70, 70), paints.RAIL, ROAD, 6.5)
            self.taken.append((s - 2, s + 2, math.inf))
            self._long_vehicle(TRAIN, self._athwart(s, rng.uniform(-30, -4), 1), rng.integer(7, 13))

    def _pole(self, s, t, height, width):
        """Puts up a pole and returns its colours."""
        palette = self.palette(METAL=self.tint(self.pick(paints.POLE_PAINT), 0.06))
        x, y = self.stand(shapes.bar([(0, 0), (0, height)], width), palette, s, t, POLE)
        self.cast((x - width / 2, y), (x + width / 2, y), height)
        return palette

    def _furniture(self, side):
        """Lamps or masts, street trees, lights, signs and railings along a kerb."""
        rng = self.rng
        inset = min(0.5, (self.verge[side] + self.pavement[side]) * 0.4 + 0.1)
        t = side * (self.edge(side) + inset)
        far = min(80.0, self.far)
        if self.chance(0.75):
            height = rng.uniform(5, 8.5)
            step = rng.uniform(16, 30)
            lamps = self.chance(0.8)
            for s in np.arange(rng.uniform(4, 16), far, step).tolist():
                palette = self._pole(s, t, height, rng.uniform(0.17, 0.26))
                if lamps:
                    reach = -side * rng.uniform(0.9, 2.0)
                    head = shapes.lamp_head(reach, height)
                    x, y = self.stand(head, palette, s, t, POLE, s - 0.01)
                    self.mesh.lamps.append((x + reach, y, height))
        if self.chance(0.55):
            for s in np.arange(rng.uniform(5, 14), far, rng.uniform(6, 14)).tolist():
                if not (self.crossing and self.crossing[0] - 3 < s < self.crossing[1] + 3):
                    self.tree(s + rng.normal(0, 0.5), t + side * 0.5, rng.uniform(4, 9))
        if self.chance(0.65 if self.crossing else 0.4):
            self._signals(side, t)
        for _ in range(rng.integer(0, 4)):
            self._sign(rng.uniform(4, 22), t + side * rng.uniform(-0.1, 0.4))
        if self.pavement[side] > 2 and self.chance(0.2):
            s = rng.uniform(1, 15)
            self.fence(side, s, s + rng.uniform(5, 15), self.edge(side) + self.verge[side] + 0.25)

    def _signals(self, side, t):
        """Traffic lights on a pole and, at times, on a mast over the road."""
        rng = self.rng
        s = min(max((self.crossing[0] if self.crossing else rng.uniform(7, 22)) - 1, 6.0), 20.0)
        lit = rng.integer(0, 3)
        height = rng.uniform(2.3, 3.2)
        size = rng.uniform(1.15, 1.6)
        model = self.pick(self.models["light"][2 * lit : 2 * lit + 2])
        palette = self.palette(TRIM=self.tint(self.pick(paints.SIGNAL_PAINT), 0.05))
        metal = self._pole(s, t, height + 0.3, 0.18)
        heads = [(0.0, height)]
        if self.chance(0.5):
            reach = -side * rng.uniform(2.5, 5.5)
            top = rng.uniform(5.0, 6.0)
            self.stand(shapes.bar([(0, 0), (0, top), (reach, top + 0.15)], 0.2), metal, s, t, POLE)
            heads.append((reach, top - 0.75))
        scale = (size, 1, size)
        for shift, z in heads:
            obj = self.mesh.object(LIGHT)
            self.stand(model, palette, s, t, LIGHT, s - 0.02, obj, scale, shift, z)

    def _sign(self, s, t):
        """One or two signs on a pole, or a wide one with directions."""
        rng = self.rng
        signs = self.models["sign"]
        if self.chance(0.22):
            z = rng.uniform(3.0, 4.5)
            size = rng.uniform(0.8, 1.25)
            shown = [signs[6]]
        else:
            z = rng.uniform(2.2, 2.9)
            size = rng.uniform(1.0, 1.4)
            shown = [self.pick(signs[:6]) for _ in range(2 if self.chance(0.3) else 1)]
        self._pole(s, t, z + 0.3, 0.15)
        green = shown[0] is signs[6] and self.chance(0.35)
        color = self.tint(paints.SIGN_GREEN if green else paints.SIGN_BLUE)
        palette = self.palette(TOP=color, RED=paints.SIGN_RED)
        scale = (size, 1, size)
        for i, model in enumerate(shown):
            obj = self.mesh.object(SIGN)
            top = z - 0.95 * size * i
            self.stand(model, palette, s, t, SIGN, s - 0.02, obj, scale, z=top)

    def _person(self, s, t):
        child = self.chance(0.1)
        tall = self.rng.uniform(0.62, 0.8) if child else self.rng.uniform(0.93, 1.08)
        top = self.tint(self.pick(paints.WEAR), 0.1)
        legs = self.tint(self.pick(paints.WEAR), 0.1, 0.65)
        bag = self.tint(self.pick(paints.WEAR))
        skin = self.pick(paints.SKIN_TONES)
        hair = self.tint(self.pick(paints.HAIR_TONES))
        palette = self.palette(TOP=top, LEGS=legs, TRIM=bag, SKIN=skin, HAIR=hair)
        scale = (tall * self.rng.uniform(0.9, 1.15) * self.pick([-1, 1]), 1, tall)
        shape = self.pick(self.models["person"])
        x, y = self.stand(shape, palette, s, t, PERSON, s, self.mesh.object(PERSON), scale)
        self.cast((x - 0.2, y), (x + 0.2, y), 1.7 * tall)
        corners = ((-0.3, -0.2), (0.3, -0.2), (0.3, 0.2), (-0.3, 0.2))
        self.mesh.contacts.append([(x + dx, y + dy, 0) for dx, dy in corners])

    def _pavement_life(self, side):
        """People who walk and wait on a pavement, and two-wheelers parked there."""
        rng = self.rng
        width = self.pavement[side] + self.verge[side]
        if width < 1:
            return
        inner = self.edge(side) + 0.5
        outer = self.edge(side) + width - 0.3
        for _ in range(self.pick([0, 0, 1, 1, 2, 3, 4, 6, 8])):
            self._person(4 + rng.exponential(14), side * rng.uniform(inner, outer))
        if self.chance(0.15):
            s = rng.uniform(5, 16)
            t = rng.uniform(inner, outer)
            for _ in range(rng.integer(5, 12)):
                along = s + rng.normal(0, 1.2)
                self._person(along, side * min(max(t + rng.normal(0, 0.8), inner), outer))
        for label, p in ((BICYCLE, 0.36), (MOTORCYCLE, 0.30)):
            if self.chance(p):
                s = rng.uniform(3.5, 13)
                across = self.chance(0.5)
                step, t = (rng.uniform(0.6, 1.1), inner + 0.5) if across else (2.0, inner)
                for i in range(rng.integer(1, 5)):
                    turn = rng.normal(0, 0.1) + (math.pi / 2 if across else 0)
                    heading = self.road.heading(s) + (turn + self.pick([0, math.pi]))
                    ridden = self.chance(0.1)
                    self._two_wheeler(label, s + i * step, side * t, heading, ridden)

    def _crossers(self):
        """People who cross the road on foot or on two wheels."""
        rng = self.rng
        if self.zebra or self.chance(0.2):
            s = self.zebra or rng.uniform(6, 18)
            for _ in range(rng.integer(0, 6)):
                self._person(s + rng.uniform(0.3, 2.7), rng.uniform(-self.half, self.half))
        for p in (0.35, 0.15):
            s = rng.uniform(6, 13)
            t = rng.uniform(-self.half, self.half)
            if self.chance(p) and self.free(s - 1, s + 1, t, 0.3):
                turn = self.pick([-1, 1]) * math.pi / 2 + rng.normal(0, 0.3)
                label = self.pick([BICYCLE, BICYCLE, MOTORCYCLE])
                self._two_wheeler(label, s, t, self.road.heading(s) + turn, ridden=True)
