"""The question of a study, and its answer in sentences made from the figures."""

from collections.abc import Callable

from jaxdg.studies.report.study_json import MEANS, Figure, Group, Study

QUESTIONS = {
    "pretraining": (
        "Which pre-trained encoder does best on domains it was never trained on, and is it better"
        " tuned or frozen?"
    ),
    "freezing": (
        "How many of the encoder's blocks can stay as pre-trained, counted from the first or from"
        " the last?"
    ),
    "methods": (
        "What do adapters, averages and other switches of training gain on domains never seen, and"
        " what do they cost?"
    ),
    "corruptions": (
        "How much of its score does a model keep on images that are noisy, blurred, foggy or"
        " compressed?"
    ),
    "transfer": "How well does a model that was trained on one domain do on the others?",
    "seeds": "How much do runs vary if only their seed differs?",
}


def findings(study: Study) -> list[str]:
    """The answer from the finished runs, and a sentence that names the others."""
    missing = [run["name"] for run in study.json["runs"] if run["status"] != "finished"]
    sentences = ["No run has finished, so nothing was found yet."]
    if study.finished():
        sentences = [_ANSWERS[study.name](study)]
    if missing:
        planned = len(study.json["runs"])
        sentences.append(
            f"{len(missing)} of {_count(planned, 'planned run')} did not finish and are shown as"
            f" missing: {', '.join(missing)}."
        )
    return sentences


def figure_text(figure: Figure, unit: str = "") -> str:
    """A figure with its number and spread: 46.4 mIoU (n = 3, spread 0.5)."""
    spread = "" if figure["spread"] is None else f", spread {figure['spread']:.1f}"
    return f"{figure['mean']:.1f}{unit and f' {unit}'} (n = {figure['n']}{spread})"


def _compared(a: Figure, b: Figure) -> str:
    """The difference of two figures, and whether it may be chance."""
    difference = round(a["mean"], 1) - round(b["mean"], 1)
    spreads = [f["spread"] for f in (a, b) if f["spread"] is not None]
    doubt = ""
    if len(spreads) < 2:
        doubt = ", of single runs, so it may be chance"
    elif abs(difference) < sum(spreads):
        doubt = ", less than the two spreads together, so it may be chance"
    return f"{difference:+.1f}{doubt}".replace("-", "−")  # noqa: RUF001  a minus sign


def _best(study: Study) -> str:
    """The best group on unseen domains, compared with the next and the last."""
    ranked = study.ranked()
    if not ranked:
        return "No domain was judged that was not trained on."

    def mean(group):
        return study.figure(group, "mean_unseen")

    best = figure_text(mean(ranked[0]), study.score)
    text = f"Highest mean over unseen domains: {_name(ranked[0])}, {best}."
    if len(ranked) > 1:
        difference = _compared(mean(ranked[0]), mean(ranked[1]))
        text += f" Against the next, {_name(ranked[1])}: {difference}."
    if len(ranked) > 2:
        text += f" Lowest: {_name(ranked[-1])}, {figure_text(mean(ranked[-1]), study.score)}."
    return text


def _pretraining(study: Study) -> str:
    def settings(group):
        return {k: v for k, v in group["settings"].items() if k != "model.freeze"}

    pairs = [
        f"{_name(tuned)} against {_name(frozen)}"
        f" {_compared(study.figure(tuned, 'mean_unseen'), study.figure(frozen, 'mean_unseen'))}"
        for tuned in study.ranked()
        for frozen in study.ranked()
        if tuned["settings"].get("model.freeze", "none") == "none"
        and frozen["settings"].get("model.freeze") == "all"
        and settings(tuned) == settings(frozen)
    ]
    return _best(study) + (f" Tuned or frozen: {'; '.join(pairs)}." if pairs else "")


def _freezing(study: Study) -> str:
    none = next((g for g in study.ranked() if g["settings"].get("model.freeze") == "none"), None)
    best = study.ranked()[:1]
    if none is None or not best or best[0] is none:
        return _best(study)

    def mean(group):
        return study.figure(group, "mean_unseen")

    return (
        f"{_best(study)} Against none frozen, {figure_text(mean(none))}:"
        f" {_compared(mean(best[0]), mean(none))}."
    )


def _corruptions(study: Study) -> str:
    hardest = max(study.severities(), default=0)
    sentences = []
    for domain in corrupted_domains(study):
        groups = []
        for group in study.groups:
            mean = study.corrupted(group, domain, hardest, relative=True)
            if not mean["n"]:
                continue
            by_kind = {
                kind: study.corrupted(group, domain, hardest, kind, relative=True)["mean"]
                for kind in study.kinds()
            }
            worst = min(by_kind, key=lambda kind: by_kind[kind])
            least = f"least under {worst.replace('_', ' ')}, {by_kind[worst]:.0f} %"
            groups.append(f"{_name(group)} {mean['mean']:.0f} % (n = {mean['n']}; {least})")
        if groups:
            sentences.append(
                f"Kept of the score on clean images of {domain} at severity {hardest}:"
                f" {', '.join(groups)}."
            )
    return " ".join(sentences) or "No model was judged on every kind of corruption yet."


def corrupted_domains(study: Study) -> list[str]:
    """The domains whose images were corrupted and that have a truth."""
    domains = dict.fromkeys(
        domain for run in study.json["runs"] for domain in run.get("corruptions") or {}
    )
    return [domain for domain in domains if domain not in study.without_truth()]


def _transfer(study: Study) -> str:
    ranked = study.ranked("rPD")
    if not ranked:
        return _best(study)
    first, last = (
        f"{_name(g)} {figure_text(study.figure(g, 'rPD'))}" for g in (ranked[0], ranked[-1])
    )
    least = f", lowest {last}" if len(ranked) > 1 else ""
    return (
        f"{_best(study)} Mean over unseen domains in % of the score on the own one (rPD): highest"
        f" {first}{least}."
    )


def _seeds(study: Study) -> str:
    sentences = []
    for group in study.groups:
        figures = {
            column: study.figure(group, column) for column in (*study.domains(), "mean_unseen")
        }
        figures = {name: figure for name, figure in figures.items() if figure["spread"] is not None}
        if not figures:
            continue
        widest = max(figures, key=lambda name: figures[name]["spread"])
        values = study.values(group, widest)
        sentence = (
            f"{_name(group)}: over {_count(figures[widest]['n'], 'seed')} the widest spread is"
            f" {figures[widest]['spread']:.1f} {study.score}, on {MEANS.get(widest, widest)} (from"
            f" {min(values):.1f} to {max(values):.1f})"
        )
        if "mean_unseen" in figures:
            sentence += f"; mean unseen {figure_text(figures['mean_unseen'])}"
        sentences.append(f"{sentence}.")
    return " ".join(sentences) or "A spread needs two finished runs."


def _name(group: Group) -> str:
    return f"“{group['group']}”"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


_ANSWERS: dict[str, Callable[[Study], str]] = {
    "pretraining": _pretraining,
    "freezing": _freezing,
    "methods": _best,
    "corruptions": _corruptions,
    "transfer": _transfer,
    "seeds": _seeds,
}
