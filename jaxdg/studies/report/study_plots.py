"""The plots of a study, beside those of published figures."""

from jaxdg.evaluation import results
from jaxdg.report import plots
from jaxdg.report.document import MISSING, Plots
from jaxdg.studies.report.findings import corrupted_domains
from jaxdg.studies.report.published import FREEZING_FIRST, FREEZING_LAST, FREEZING_NONE
from jaxdg.studies.report.study_json import MEANS, Group, Study


def _bar(study: Study, group: Group, column: str, more: str = "") -> plots.Bar:
    figure = study.figure(group, column)
    planned = group["of"]
    if figure["mean"] is None:
        none = results.NO_TRUTH if column in study.without_truth() else "not judged"
        if not study.finished(group):
            none = f"{MISSING} (0 of {planned} runs)"
        return plots.Bar(None, None, none)
    spread = "" if figure["spread"] is None else f" ± {figure['spread']:.1f}"
    of = "" if figure["n"] == planned else f" of {planned}"
    values = study.values(group, column)
    text = f"{figure['mean']:.1f}{spread} (n = {figure['n']}{of}){more}"
    return plots.Bar(
        figure["mean"], figure["spread"], text, tuple(values) if len(values) > 1 else ()
    )


def domain_bars(study: Study) -> Plots:
    """Every group on every domain, one plot a domain."""
    drawn = []
    for column in ("mean_unseen", *study.domains()):
        groups = [
            plots.BarGroup(group["group"], (_bar(study, group, column),)) for group in study.groups
        ]
        svg = plots.bars(MEANS.get(column, column), groups, (), f"{study.score} in %")
        drawn.append((f"bars_{_file(column)}", svg))
    caption = (
        "Mean over seeds; whiskers: sample standard deviation; dots: single runs. No whisker, no"
        " spread: one run."
    )
    return Plots(tuple(drawn), _captioned(study, caption))


def _captioned(study: Study, caption: str) -> str:
    """A caption of plots, with the sentences that their reader needs."""
    return " ".join([caption, *(f"{line}." for line in study.remarks())])


def gap_bars(study: Study) -> Plots:
    """The source domain against the mean of the unseen ones."""
    groups = []
    for group in study.groups:
        rpd = study.figure(group, "rPD")["mean"]
        more = "" if rpd is None else f", rPD {rpd:.0f} %"
        pair = (_bar(study, group, "seen"), _bar(study, group, "mean_unseen", more))
        groups.append(plots.BarGroup(group["group"], pair))
    names = ("domain trained on", "mean of unseen domains")
    drawn = plots.bars("The gap between domains", groups, names, f"{study.score} in %")
    caption = (
        "What is lost from the domain trained on to domains never seen. rPD: the second bar in % of"
        " the first."
    )
    return Plots((("gap", drawn),), _captioned(study, caption))


def _frozen(group: Group) -> tuple[str, int] | None:
    """Which blocks of a group are frozen and how many, as (first or last, n); ("", 0) for none."""
    which, _, number = group["settings"].get("model.freeze", "none").partition(" ")
    if which == "none":
        return "", 0
    return (which, int(number)) if which in ("first", "last") and number.isdigit() else None


def freezing_plots(study: Study) -> Plots:
    frozen = {place: group for group in study.groups if (place := _frozen(group))}
    drawn = []
    for which in ("first", "last"):
        counts = sorted(n for kind, n in frozen if kind in ("", which))
        series = []
        for column in (*study.domains(), "mean_unseen"):
            points = []
            for n in counts:
                figure = study.figure(frozen[(which, n) if n else ("", 0)], column)
                points.append(plots.Point(n, figure["mean"], figure["spread"]))
            series.append(plots.Line(MEANS.get(column, column), tuple(points)))
        if counts not in ([], [0]):
            title = f"The {which} blocks frozen"
            axis = f"{which} blocks frozen (number)"
            ticks = [(n, str(n)) for n in counts]
            svg = plots.lines(title, series, axis, f"{study.score} in %", ticks)
            drawn.append((f"{which}_frozen", svg))
    caption = (
        "Mean over seeds by the number of frozen blocks; whiskers: sample standard deviation. The"
        " axis does not begin at 0."
    )
    return Plots(tuple(drawn), _captioned(study, caption))


def published_freezing() -> Plots:
    drawn = []
    for which, table in (("first", FREEZING_FIRST), ("last", FREEZING_LAST)):
        series = [
            plots.Line(d, tuple(plots.Point(n, y) for n, y in enumerate((FREEZING_NONE[d], *ys))))
            for d, ys in table.items()
        ]
        ticks = [(n, str(n)) for n in range(0, 13, 2)]
        title = f"Published: the {which} blocks frozen"
        axis = f"{which} blocks frozen (number)"
        svg = plots.lines(title, series, axis, "mIoU in %", ticks)
        drawn.append((f"published_{which}", svg))
    caption = (
        "Published, read off the poster's plot: EVA-02-CLIP B/16 trained on GTA5, one run each as"
        " far as is known."
    )
    return Plots(tuple(drawn), caption)


def severity_plots(study: Study) -> Plots:
    severities = [0, *study.severities()]
    drawn = []
    ticks = [(s, "clean" if s == 0 else str(s)) for s in severities]
    for domain in corrupted_domains(study):
        series = []
        for group in study.groups:
            points = []
            for s in severities:
                figure = study.corrupted(group, domain, severity=s)
                points.append(plots.Point(s, figure["mean"], figure["spread"]))
            series.append(plots.Line(group["group"], tuple(points)))
        svg = plots.lines(domain, series, "severity", f"{study.score} in %", ticks)
        drawn.append((f"severity_{_file(domain)}", svg))
    caption = (
        f"Mean over {len(study.kinds())} kinds of corruption by severity; whiskers: spread over"
        " seeds. The axis does not begin at 0."
    )
    return Plots(tuple(drawn), _captioned(study, caption))


def published_severities(study: Study) -> Plots:
    drawn = []
    for table in study.published():
        severities = list(map(int, table.columns))
        series = []
        for row in table.rows:
            points = map(plots.Point, severities, row.values)
            series.append(plots.Line(row.name, tuple(points)))
        ticks = [(s, str(s)) for s in severities]
        svg = plots.lines("Published", series, "severity", f"{study.score} in %", ticks)
        drawn.append(("published", svg))
    caption = (
        "Published, read off the poster's plot: other models on other data, not to be compared with"
        " ours in height."
    )
    return Plots(tuple(drawn), caption)


def _file(name: str) -> str:
    return name.replace("/", "_")
