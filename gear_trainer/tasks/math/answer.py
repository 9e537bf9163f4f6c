"""The words of a turn that are its answer: a rule that is written down, so that a reward is never an accident of parsing.

The answer is what the last `\\boxed{}` holds; earlier boxes, and whatever stands around them, do not count. A turn without a box
answers where its end says so, and only there, by one of

- a last line `#### 18` (GSM8K's);
- a last sentence `... the answer is 18.` or `Answer: 18`, nothing behind it ("The answer is 18. But 20 is also nice" is none);
- nothing but the answer, on one line without words (`18`, `$\\frac{1}{2}$`).

Several values joined by words, as "5 hours and 30 minutes", are no answer, unless the gold answer is of that form too. Digits
grouped by spaces (70 000, 70\\,000) are one number. Where the gold answer names an option of the problem (`C: 7`), its
letter or its value answers it, and both together; the letter of another option does not, whatever stands behind it.
"""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_LAST_LINE = re.compile(r"(?:\A|\n)[ \t]*####(?P<answer>[^\n]+)\Z")
_LAST_SENTENCE = re.compile(
    r"\banswer\b(?:[^\n.:=]{0,60}?\bis\b\s*:?|[\s*_]*[:=])[\s*_]*(?P<answer>(?:[^\n.]|\.(?=\S))+?)\Z", re.IGNORECASE
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character of the answer
_END = 400  # characters in which a statement of the answer stands, so that no degenerate text takes long
_AROUND = " .*_\n"
_HOPE = re.compile(r"\.?\s*I hope (?:it|this) is correct\Z", re.IGNORECASE)  # the few-shot prompt of MATH ends so
_SPACE = r"(?: |\\,|\\ |\\;|\\:|~|[\u00a0\u2009\u202f])"
_GROUPED = re.compile(rf"(?<![\d.,])(\d{{1,3}}(?:{_SPACE}\d{{3}})+)(?![\d,]|\.\d{{0,2}},)")
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mbox|mathrm)\s*\{([^{}]*)\}")
# exponents and indices (cm^2, base 10) and LaTeX's commands
_NO_VALUE = re.compile(r"[\^_]\s*(?:\{[^{}]*\}|\\[A-Za-z]+|\w)|\\[A-Za-z]+")
_MATHS = r"(?!(?:and|or|sqrt|pi|frac|sin|cos|tan|log|ln|exp|infty|inf|mod|base)(?![A-Za-z]))"
_SPELLING = re.compile(r"\s+|\\[,;:! ]|\\(?:left|right)(?![A-Za-z])|\\?\$")
_NUMBER = re.compile(r"[-+]?\d{1,3}(?:,\d{3})*(?:\.\d+)?|[-+]?\d+(?:\.\d+)?")
_JOINING = re.compile(rf"(?<![A-Za-z]){_MATHS}[A-Za-z]{{2,}}")
_OPTION = re.compile(
    r"(?P<text>\\(?:text|textbf|mathrm)\s*\{\s*)?(?:\((?P<held>[A-H])\)[:.]?|(?P<bare>[A-H])[:.)])(?(text)\s*\})\s*(?P<value>\S.*)",
    re.DOTALL,
)
# a number with its unit in words, as `18 dollars` or `5 m/s`; what counts or divides is no unit
_MEASURED = re.compile(
    r"(?P<number>(?:\\?\$)?-?[\d.,]*\d(?:/\d+)?)\s+(?!hundred|thousand|.?illion|dozen|percent|half|halves|third|quarter"
    r"|(?:four|fif|six|seven|eigh|nin|ten|twelf)th|(?:and|or|sqrt|pi|mod|squared|cubed|factorial)\b)"
    r"(?:[A-Za-z][A-Za-z][A-Za-z .]*|[A-Za-z]+/[A-Za-z]+)"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, braces matched; without braces its first word, as in `\\boxed 5`."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :]
    return _braced(rest) if rest.startswith("{") else next(iter(rest.split("$")[0].split()), None)


def final_answer(gold: str, text: str) -> str | None:
    """The answer that a turn gives, written as math-verify reads it; None where it gives none."""
    boxed = _BOX.search(text) is not None
    given = last_boxed(text) if boxed else _stated(text.strip())
    if given is None or (_several(given) and not _several(gold)):
        return None
    given = ungrouped(given)
    if len(given) < _END and (measured := _MEASURED.fullmatch(given.strip())) and not _WORD.search(gold):
        given = measured["number"]
    if boxed:
        given = given.rstrip(_AROUND) if given.endswith(".") else given
        return f"\\boxed{{{given}}}"
    given = given.replace("\\$", "$")
    return f"${given}$" if "\\" in given and "$" not in given else given


def plain_answer(gold: str, text: str) -> str | None:
    """The answer that a turn gives, spelled so that most equal ones are equal texts: no box, spaces, commas within a number, .0,
    dollar signs, sizes of brackets and fractions. None where it gives none."""
    answer = final_answer(gold, text)
    if answer is None:
        return None
    plain = answer.removeprefix("\\boxed{").removesuffix("}") if answer.startswith("\\boxed{") else answer
    plain = _SPELLING.sub("", plain).replace("dfrac", "frac").replace("tfrac", "frac").rstrip(".")
    return re.sub(r"\.0+\Z", "", plain.replace(",", "")) if _NUMBER.fullmatch(plain) else plain or None


def ungrouped(text: str) -> str:
    """Spaces between the thousands of a number left out."""
    return _GROUPED.sub(lambda m: re.sub(_SPACE, "", m[1]), text)


def _braced(text: str) -> str | None:
    """What stands in the braces that a text begins with; None where they do not close."""
    depth = 0
    for brace in _BRACE.finditer(text):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[1 : brace.start()]
    return None


def _stated(text: str) -> str | None:
    """The answer that the end of a text without a box gives."""
    text = _HOPE.sub("", text.rstrip(_AROUND)).rstrip(_AROUND)
    end = text[-_END:]
    if found := _LAST_LINE.search(end) or _LAST_SENTENCE.search(end):
        return found["answer"].strip(_AROUND) or None
    return None if "\n" in text or _WORD.search(_TEXT.sub("", text)) else text or None


def _several(answer: str) -> bool:
    """Whether words join two values in an answer."""
    values = _NO_VALUE.sub(" ", _TEXT.sub(r" \1 ", answer))
    digits = [at for at, char in enumerate(values) if char.isdigit()]
    return bool(digits) and _JOINING.search(values[digits[0] : digits[-1]]) is not None


def readings(gold: str, answer: str) -> list[tuple[str, str]]:
    """The pairs of a gold answer and a `final_answer`, or of their parts, of which one must agree."""
    box = answer.startswith("\\boxed{")
    inner = answer.removeprefix("\\boxed{")[:-1] if box else answer
    wanted, given = _option(gold), _option(inner)
    if wanted and given:
        pairs = [(wanted[1], given[1])] if wanted[0] == given[0] else []
    elif wanted:
        pairs = [(part, inner) for part in wanted[::-1]]
    else:
        pairs = [(gold, part) for part in (inner, *(given or ()))]
    return [(ungrouped(one), f"\\boxed{{{other}}}" if box else other) for one, other in pairs]


def _option(answer: str) -> tuple[str, str] | None:
    """The letter and the value of `C: 7`, `(C) 7` and `\\textbf{(C)} 7`."""
    found = _OPTION.fullmatch(answer.strip().strip("$"))
    return (found["held"] or found["bare"], found["value"]) if found else None
