"""The extractor `text`: short salient spans of a solution in prose; the solution need not contain any symbols."""

from __future__ import annotations

import re

from dail_jax import latex
from dail_jax.data.formulas import CONTINUED, WORDS, collapsed, without_figures
from dail_jax.data.records import Row

_FIRST, _LAST = 0xF0000, 0xFFFFD  # private-use characters, each of which stands for a formula
_FORMULA = re.compile("[\U000f0000-\U0010ffff]")
_DOT = "\ue001"  # stands for the full stop of an abbreviation, which does not end a sentence

_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?](?=\w)[^.!?\n]+)*")
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Ms|Dr|St|Prof|vs|cf|Fig|Eq|i\.e|e\.g)\.")
_WRAP = re.compile(r"(?<![.!?:;\n])\n(?=[a-z\U000f0000-\U0010ffff])")  # a line break inside a sentence
_NEXT = re.compile(r"\s*[A-Z](?:[a-z]+)? [a-z]")  # how a new sentence begins after a formula
_STATEMENT = re.compile(r"[=<>]|\\(?:equiv|approx|[lg]eq?)(?![a-zA-Z])")
# Signatures of authors, at the end of a solution or of a line, and copyright notices.
_SIGNATURE = re.compile(
    r"(?:(?<=[\s.!?$}\])])|^)~ ?[A-Za-z][^\n~$\\]{0,60}$|(?<=[.!?$}\])] )[-\u2013\u2014]{1,2} ?\w+ ?$"
    r"|^ ?[-\u2013\u2014]{1,2} ?(?:Solution|LaTeX|Edit|Credit|Written|Minor)\w*\b[^\n]*$|^[^\n]*\bcopyrighted by\b[^\n]*$",
    re.MULTILINE,
)
_CUE = re.compile(
    r"\b(?:therefore|thus|hence|consequently|accordingly|so(?= (?:the|we|it|that|a|an|there|this|they|he|she)\b)"
    r"|it follows that|(?:this|which|that) (?:means|shows|implies|gives|suggests|proves|makes|leaves)(?: that)?"
    r"|we (?:also |can |now |then )?(?:conclude|find|see|obtain|infer|deduce|get|know)(?: that)?|(?:must|can only) be|turns out(?: to be| that)?"
    r"|in other words|as a result|the (?:answer|conclusion|result|reason|cause|key|point) is(?: that)?"
    r"|(?:so|we have|gives?|giving|yields?|yielding|to get|to obtain|implies|implying)(?=[:,]? [\U000f0000-\U0010ffff])"
    r")\b[,:]?\s*",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"[;:,](?=\s)|\s(?:because|since|although|while|whereas|and so)\s")
_QUOTED = re.compile(r"[\"\u201c]([^\"\u201c\u201d\n]{3,60})[\"\u201d]|(?<!\*)\*\*?([^*\n]{3,60})\*\*?(?!\*)")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})++|\d++)(?:\.\d++)?+"
_MEASURE = re.compile(
    rf"(?<![\w.,])(?P<amount>[$\u20ac\u00a3]?(?P<number>{_NUMBER})) ?"
    r"(?:%|(?P<unit>(?:[^\W\d_]{2,}+|[mgshlLKNJVWAC](?![^\W\d_]))(?:/[^\W\d_]+)?)(?P<noun> [^\W\d_]{3,}+)?)"
)
_FACTOR = re.compile(r" ?(?:[*/\u00d7=]|x\b)")  # a number before one of these is an input to a result
_PROPER = re.compile(r"(?<!\A)(?<=[a-z,;] )[A-Z][\w'\u2019-]+(?:\s+(?:of\s+|the\s+|de\s+)?[A-Z][\w'\u2019-]+)*")
_NO_NAME = frozenset(
    [
        "LHS",
        "RHS",
        "WLOG",
        "QED",
        "LaTeX",
        "AIME",
        "AMC",
        "AoPS",
        "Solution",
        "Note",
        "Case",
        "Step",
        "Method",
        "Lemma",
        "Theorem",
    ]
)
# TeX outside formulas: commands that only lay out the text, and all others, which are treated as formulas.
_LAYOUT = re.compile(
    r"\\(?:begin|end|label|ref|[vh]space|section|subsection|paragraph)\*?\s*\{[^{}]*\}|\\(?:item|noindent|par|\\)(?![a-zA-Z])"
)
_BARE = re.compile(r"\\[a-zA-Z]+(?:\s*\{(?:[^{}]|\{[^{}]*\})*\})*")
_LONGEST, _WINDOW = 160, 400  # characters of a span, and of the text that it is cut from
_WORDS_MAX = 16
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
        your thus hence therefore however finally note notice without per times every first second third next get gets make makes made take takes
        use used using see way well much many whose less
        """,
    )
)


_Span = tuple[int, int, str]  # start, end, text


def salient(row: Row) -> list[str]:
    """Short salient spans of a prose solution, in order: conclusions, names, quotations, measures, recurring phrases.

    Whatever the problem already states does not count. Longer solutions give longer lists.
    """
    solution, formulas = _masked(_SIGNATURE.sub(" ", without_figures(collapsed(row.solution))))
    solution = _WRAP.sub(" ", re.sub(r" ?\n+ ?", "\n", collapsed(solution)))
    known = set(re.findall(r"\w+", row.problem.casefold()))
    found: list[_Span] = []
    for sentence in _SENTENCE.finditer(solution):
        found += _conclusions(sentence, formulas, known)
    for pattern in (_QUOTED, _PROPER):
        for match in pattern.finditer(solution):
            span = next((group for group in match.groups() if group), match[0]).strip()
            named = not _NO_NAME.issuperset(span.split())
            if named and not known.issuperset(re.findall(r"\w+", span.casefold())):
                found.append((match.start(), match.end(), _closed(" ".join(span.split()))))
    found += _measures(solution, row.problem)
    found += _phrases(solution, known)
    kept: list[_Span] = []
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


def _conclusions(sentence: re.Match[str], formulas: list[str], known: set[str]) -> list[_Span]:
    """The last informative clause of a sentence that follows a cue, and all such clauses that state a formula."""
    found: list[_Span] = []
    end = len(sentence[0])  # of the clause: the start of the next cue
    for cue in reversed(list(_CUE.finditer(sentence[0]))):
        window = sentence[0][cue.end() : min(cue.end() + _WINDOW, end)]
        before_cue, end = end < len(sentence[0]), cue.start()
        clause = _closed(_CLAUSE_END.split(window)[0])
        words = clause.split()
        cut = len(words) > _WORDS_MAX or (before_cue and len(clause) == len(window))
        words = words[:_WORDS_MAX]
        if len(_shown(" ".join(words), formulas)) > _LONGEST and _FORMULA.match(clause):
            words = words[:1]  # a displayed formula, after which the sentence continues
        while cut and words and words[-1].casefold() in _STOP:
            words.pop()
        shown = _shown(" ".join(words), formulas)
        said = re.findall(r"\w+", shown.casefold())
        if known.issuperset(said) or len(shown) > _LONGEST:
            continue
        states = _STATEMENT.search(shown) is not None
        if states or re.search(r"\d", shown):
            enough = len(said) > 1
        else:  # words alone: more than "a contradiction" or "we discard it"
            enough = len(words) > 2 and words[0].casefold() not in ("we", "i", "you", "let")
        if enough and (states or not found):
            start = sentence.start() + cue.end()
            found.append((start, start + len(" ".join(words)), _closed(" ".join(words))))
    return found


def _measures(solution: str, problem: str) -> list[_Span]:
    """Numbers with what they count or measure, unless the problem gives them and no equals sign precedes them."""
    given = {number.replace(",", "") for number in re.findall(_NUMBER, problem)}
    found: list[_Span] = []
    for match in _MEASURE.finditer(solution):
        unit, noun = match["unit"], match["noun"] or ""
        span, end = match[0].removesuffix(noun), match.end() - len(noun)
        if unit and unit.casefold() in _STOP:
            continue  # `3 of` measures nothing
        if unit and not unit.endswith("s") and noun and noun.strip().casefold() not in _STOP:
            span, end = match[0], match.end()  # `27 dandelion puffs`
        computed = solution[max(0, match.start() - 2) : match.start()] in ("= ", " =", "=")
        if _FACTOR.match(solution, end) or (match["number"].replace(",", "") in given and not computed):
            continue
        found.append((match.start(), end, span))
    return found


def _masked(text: str) -> tuple[str, list[str]]:
    """(the text with one character per formula, so that no formula is cut or read as words; the formulas)."""
    formulas: list[str] = []

    def mask(formula: str) -> str:
        formulas.append(" ".join(formula.split()))
        return chr(_FIRST + len(formulas) - 1) if _FIRST + len(formulas) <= _LAST else " "

    parts: list[str] = []
    pieces = list(latex.spans(latex.unbox(_FORMULA.sub(" ", text))))
    for i, (is_formula, piece) in enumerate(pieces):
        if is_formula:
            content = re.sub(r"(?<![\s,;])[\s,;]*+\\\\", ", ", CONTINUED.sub(" ", piece))
            content = re.sub(r"(?<!\\)&", " ", content).strip(" .,;:\n")
            parts.append(mask(f"${content}$") if content else " ")
            behind = pieces[i + 1][1] if i + 1 < len(pieces) else ""
            if piece.rstrip().endswith(".") or (_STATEMENT.search(content) and _NEXT.match(behind)):
                parts.append(".\n")  # the sentence ends with its formula
        else:
            words = WORDS.sub(r"\1", _LAYOUT.sub(" ", piece))
            words = _ABBREVIATION.sub(rf"\1{_DOT}", words)
            parts.append(_BARE.sub(lambda match: mask(match[0]), words))
    return "".join(parts), formulas


def _shown(span: str, formulas: list[str]) -> str:
    """A span with its formulas back in place."""
    return _FORMULA.sub(lambda match: formulas[ord(match[0]) - _FIRST], span).replace(_DOT, ".")


def _closed(span: str) -> str:
    """The span up to the first bracket that has no partner in it."""
    waiting: list[int] = []
    for match in re.finditer(r"[()\[\]{}]", span):
        if match[0] in "([{":
            waiting.append(match.start())
        elif not waiting or span[waiting.pop()] + match[0] not in ("()", "[]", "{}"):
            return span[: match.start()]
    return span[: waiting[0]] if waiting else span


def _phrases(solution: str, known: set[str]) -> list[_Span]:
    """The longest and most frequent of the recurring runs of 2 to 4 content words, each where it first occurs."""
    runs: list[list[re.Match[str]]] = [[]]
    end = 0
    for word in re.finditer(r"[^\W\d_][\w'-]*", solution):
        if solution[end : word.start()].strip(" ") or word[0].casefold() in _STOP or len(word[0]) < 3:
            runs.append([])
        if word[0].casefold() not in _STOP and len(word[0]) > 2:
            runs[-1].append(word)
        end = word.end()
    places: dict[tuple[str, ...], list[_Span]] = {}
    for run in runs:
        keys = [word[0].casefold() for word in run]
        for size in (4, 3, 2):
            for i in range(len(run) - size + 1):
                start, stop = run[i].start(), run[i + size - 1].end()
                text = " ".join(solution[start:stop].split())
                places.setdefault(tuple(keys[i : i + size]), []).append((start, stop, text))
    recurring = [(key, at) for key, at in places.items() if len(at) > 1 and not known.issuperset(key)]
    recurring.sort(key=lambda item: (-len(item[0]), -len(item[1])))
    return [at[0] for _, at in recurring[: max(3, len(solution.split()) // 20)]]
