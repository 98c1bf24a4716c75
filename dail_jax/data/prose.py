"""The extractor `text`: salient short spans of a solution in prose, without any symbols."""

from __future__ import annotations

import re

from dail_jax import latex
from dail_jax.data.formulas import CONTINUED, WORDS, collapsed, without_figures
from dail_jax.data.records import Row

_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?](?=\w)[^.!?\n]+)*")
_CUE = re.compile(
    r"\b(?:therefore|thus|hence|consequently|accordingly|so(?= (?:the|we|it|that|a|an|there|this|they|he|she)\b)"
    r"|it follows that|(?:this|which|that) (?:means|shows|implies|gives|suggests|proves|makes|leaves)(?: that)?"
    r"|we (?:conclude|find|see|obtain|infer|deduce|get|know)(?: that)?|(?:must|can only) be|turns out(?: to be| that)?"
    r"|in other words|as a result|the (?:answer|conclusion|result|reason|cause|key|point) is(?: that)?)\b[,:]?\s*",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"[;:,](?=\s)|\s(?:because|since|although|while|whereas|and so)\s")
_QUOTED = re.compile(r"[\"\u201c]([^\"\u201c\u201d\n]{3,60})[\"\u201d]|(?<!\*)\*\*?([^*\n]{3,60})\*\*?(?!\*)")
_MEASURE = re.compile(
    r"(?<![\w.,])[$\u20ac\u00a3]?(?:\d{1,3}(?:,\d{3})++|\d++)(?:\.\d++)?+ ?(?:%|[^\W\d_]+(?:/[^\W\d_]+)?)"
)
_PROPER = re.compile(r"(?<!\A)(?<=[a-z,;] )[A-Z][\w-]+(?:\s+(?:of\s+|the\s+|de\s+)?[A-Z][\w-]+)*")
# TeX outside of formulas: what only lays the text out, what sets words, and values.
_LAYOUT = re.compile(
    r"\\(?:begin|end|label|ref|[vh]space|section|subsection|paragraph)\*?\s*\{[^{}]*\}|\\(?:item|noindent|par|\\)(?![a-zA-Z])"
)
_BARE = re.compile(r"\\[a-zA-Z]+(?:\s*\{(?:[^{}]|\{[^{}]*\})*\})*")
_FIRST, _LAST = 0xF0000, 0xFFFFD  # characters for private use, each of which stands for a formula
_FORMULA = re.compile("[\U000f0000-\U0010ffff]")
_LONGEST, _WINDOW = 160, 400  # characters of a span, and of the text that it is cut from
_STOP = frozenset(
    re.findall(
        r"\w+",
        """
        a about above after again all also am an and any are as at be because been before being below between
        both but by can cannot could did do does doing down during each even few for from further given had
        has have having he her here hers him his how i if in into is it its itself just let like may me might
        more most must my no nor not now of off on once one only or other our out over own same she should
        since so some such than that the their them then there these they this those through to too two under
        until up upon us very was we were what when where which while who whom why will with would yet you
        your thus hence therefore however every first second third next get gets make makes made take takes
        use used using see way well much many whose less
        """,
    )
)


def salient(row: Row) -> list[str]:
    """Salient short spans of a prose solution, in order: conclusions, names, quotations, measures, recurring terms.

    It needs no symbols. Terms that the problem has already are no results; the length of the list follows the text's.
    """
    solution, formulas = _masked(without_figures(collapsed(row.solution)))
    solution = re.sub(r" ?\n+ ?", "\n", collapsed(solution))
    known = set(re.findall(r"\w+", row.problem.casefold()))
    found: list[tuple[int, int, str]] = []  # (start, end, span)
    for sentence in _SENTENCE.finditer(solution):
        cues = list(_CUE.finditer(sentence[0]))
        if cues:  # the clause after the last cue that leaves something to say
            for cue in reversed(cues):
                clause = _closed(_CLAUSE_END.split(sentence[0][cue.end() : cue.end() + _WINDOW])[0])
                if len(_shown(clause, formulas).split()) >= 2:
                    start = sentence.start() + cue.end()
                    found.append((start, start + len(clause), _closed(" ".join(clause.split()[:14]))))
                    break
    for pattern in (_QUOTED, _MEASURE, _PROPER):
        for match in pattern.finditer(solution):
            span = next((group for group in match.groups() if group), match[0]).strip()
            if pattern is _MEASURE and span.split()[-1].casefold() in _STOP:
                continue  # `3 of` is none
            if not set(re.findall(r"\w+", span.casefold())) <= known:
                found.append((match.start(), match.end(), _closed(" ".join(span.split()))))
    found += _terms(solution, known)
    kept: list[tuple[int, int, str]] = []
    seen: set[str] = set()
    for start, end, span in sorted(found, key=lambda item: (item[0], -item[1])):
        if len(kept) == 300:
            break
        inside = kept and end <= kept[-1][1]
        if not inside and span.casefold() not in seen and not any(span.casefold() in other for other in seen):
            kept.append((start, end, span))
            seen.add(span.casefold())
    spans = [_shown(span.strip(" ,;:."), formulas) for _, _, span in kept]
    return [span for span in spans if len(span) <= _LONGEST]


def _masked(text: str) -> tuple[str, list[str]]:
    """The text with one character for each formula, so that nothing can cut it or take words from it; the formulas."""
    formulas: list[str] = []

    def mask(formula: str) -> str:
        formulas.append(" ".join(formula.split()))
        return chr(_FIRST + len(formulas) - 1) if _FIRST + len(formulas) <= _LAST else " "

    parts: list[str] = []
    for is_formula, piece in latex.spans(latex.unbox(_FORMULA.sub(" ", text))):
        if is_formula:
            content = re.sub(r"(?<![\s,;])[\s,;]*+\\\\", ", ", CONTINUED.sub(" ", piece))
            content = re.sub(r"(?<!\\)&", " ", content).strip(" .,;:\n")
            parts.append(mask(f"${content}$") if content else " ")
        else:
            words = WORDS.sub(r"\1", _LAYOUT.sub(" ", piece))
            parts.append(_BARE.sub(lambda match: mask(match[0]), words))
    return "".join(parts), formulas


def _shown(span: str, formulas: list[str]) -> str:
    """A span with its formulas back in place."""
    return _FORMULA.sub(lambda match: formulas[ord(match[0]) - _FIRST], span)


def _closed(span: str) -> str:
    """The span up to the first bracket that has no partner in it."""
    waiting: list[int] = []
    for match in re.finditer(r"[()\[\]{}]", span):
        if match[0] in "([{":
            waiting.append(match.start())
        elif not waiting or span[waiting.pop()] + match[0] not in ("()", "[]", "{}"):
            return span[: match.start()]
    return span[: waiting[0]] if waiting else span


def _terms(solution: str, known: set[str]) -> list[tuple[int, int, str]]:
    """Runs of up to 4 content words, ranked by how often and how connected their words are; the best few."""
    runs: list[list[re.Match[str]]] = [[]]
    end = 0
    for word in re.finditer(r"[^\W\d_][\w'-]*", solution):
        if solution[end : word.start()].strip(" ") or word[0].casefold() in _STOP or len(runs[-1]) == 4:
            runs.append([])
        if word[0].casefold() not in _STOP and len(word[0]) > 2:
            runs[-1].append(word)
        end = word.end()
    runs = [run for run in runs if run]
    count: dict[str, int] = {}
    company: dict[str, int] = {}
    for run in runs:
        for word in run:
            key = word[0].casefold()
            count[key] = count.get(key, 0) + 1
            company[key] = company.get(key, 0) + len(run)
    scored = []
    for run in runs:
        keys = [word[0].casefold() for word in run]
        new = [key for key in keys if key not in known]
        if new and (len(run) > 1 or count[keys[0]] > 1):
            scored.append((sum(company[key] for key in new) / len(keys), run))
    best = sorted(scored, key=lambda item: -item[0])[: max(3, len(solution.split()) // 20)]
    return [(r[0].start(), r[-1].end(), " ".join(solution[r[0].start() : r[-1].end()].split())) for _, r in best]
