r"""Where a response's answer is, and its text in one spelling.

Law: the answer is what a mark names, the last `\boxed{}`, else `#### N`, else `<answer>`. A box replaces the
one before it (self-correction), except that boxes joined by nothing but a connective (`\boxed{1}` or
`\boxed{2}`) are one list of answers.

Without any mark a sentence may name it (`phrased_answer`, for mathematics alone): "the answer is N",
"Final answer: N", "Answer: N". It must be the response's last sentence, and say so without a condition or
a doubt; two such sentences with different answers are one list of answers, unless words between them take
the first one back. Everything else that no mark names is no answer: a policy is paid for what can be found
by rule.

Source: "Answer: N" is asked for by DAPO's prompts (arXiv 2503.14476), "The final answer is N. I hope it is
correct." by Minerva's (arXiv 2206.14858), read by allenai/open-instruct and by math-verify's anchors.
Differs: math-verify takes the last number of a text that names no answer.

Work here is linear in the text.
"""

from __future__ import annotations

import enum
import itertools
import re
import unicodedata
from typing import Final

from frugal_rl.rewards.quantities import TEXT

ANSWER_CHARACTERS: Final = 300


class Verdict(enum.Enum):
    """TIMEOUT: the limit of time, memory or stack was reached. ERROR: no one knows."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TIMEOUT = "timeout"
    ERROR = "error"


# ---- where the answer is ----

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")


def boxes(text: str) -> list[tuple[int, int]]:
    r"""Where the inside of each `\boxed{}` starts and ends, by its end; one never closed does not count."""
    opened: list[int | None] = []
    found: list[tuple[int, int]] = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "{":
            opened.append(None)
        elif token == "}":
            start = opened.pop() if opened else None
            if start is not None:
                found.append((start, match.start()))
        elif token.endswith("{") and len(token) > 2:
            opened.append(match.end())
    return found


def last_boxed(text: str) -> str | None:
    r"""The inside of the `\boxed{}` that closes last. One pass."""
    found = boxes(text)
    return text[found[-1][0] : found[-1][1]] if found else None


_JOINED = re.compile(
    r"[\s$,;.&]*(?:\\(?:text|quad|qquad|mathrm)\s*\{?)?[\s$,;.~\\]*"
    r"(?:and|or|and/or|or else|or maybe|or perhaps|or possibly|or even|alternatively|maybe|perhaps|possibly)?"
    r"[\s$,;}~\\]*(?:also|else|maybe|perhaps|possibly|it is|it's)?[\s$,;]*"
    r"(?:[A-Za-z](?:_\{?\w\}?)?\s*=)?[\s$]*(?:\\(?:boxed|fbox)\s*\{)",
    re.IGNORECASE,
)


def _boxed_answer(text: str) -> str | None:
    """The last box, with those before it that it is joined to."""
    found = boxes(text)
    if not found:
        return None
    start, end = found[-1]
    parts = [text[start:end]]
    for earlier_start, earlier_end in reversed(found[-9:-1]):
        between = text[earlier_end + 1 : start]
        if earlier_start > start or len(between) > 80 or not _JOINED.fullmatch(between):
            break
        part = text[earlier_start:earlier_end]
        if part.strip() not in (p.strip() for p in parts):
            parts.insert(0, part)
        start = earlier_start
    return "; ".join(parts)


def final_answer(response: str) -> str | None:
    r"""What a mark names as the answer: the last `\boxed{}`, else `#### N`, else `<answer>`."""
    boxed = _boxed_answer(response)
    if boxed is not None:
        return boxed.strip()
    if "####" in response:
        return str(_HASHES.findall(response)[-1]).strip()
    lower = response.casefold() if response.isascii() else response
    end = lower.rfind("</answer>")
    start = lower.rfind("<answer>", 0, max(end, 0))
    return response[start + len("<answer>") : end].strip() if start >= 0 else None


_LEADS = (
    r"(?:(?:so|thus|therefore|hence|then|now|and|finally|ultimately|consequently|in conclusion|in summary"
    r"|as a result|we (?:conclude|find|get|see) that|this means(?: that)?|it follows that)[,:]?\s+)*"
)
_PHRASE = re.compile(
    rf"(?:^|(?<=[.!?;,:>\n]))[\s*#>_$-]*{_LEADS}(?:the |my |our )?"
    r"(?:(?:final|correct|right|exact|required|desired|numerical|simplified) )*"
    r"answer(?: to (?:the|this) (?:problem|question))?[*_]*"
    r"(?:\s*[:=]|\s+(?:is|are|would be|will be|equals|must be|should be)\b[:,]?)[*_]*"
    r"(?: (?:therefore|thus|then|indeed|simply|just|exactly|equal to|given by)\b:?,?)*",
    re.IGNORECASE,
)
_ANOTHER_QUESTION = re.compile(
    r"^\W*(?:question|problem|q|human|user|input|example)\b\s*\d*\s*:", re.I | re.M
)
_DOUBT = re.compile(
    r"\b(?:if|suppose|assum\w+|unless|when|maybe|perhaps|probably|might|not|wrong|incorrect|doubt|guess\w*"
    r"|unsure|whether|mistaken\w*|instead of|would say|options?|part)\b|n't\b",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\b(?:wait|no|actually|mistake\w*|wrong|incorrect|error|re-?check\w*|sorry|oops|hmm+|instead|let me"
    r"|correction|recalculat\w*|recomput\w*|redo)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)(?!\s*m\.)")
_REASON = re.compile(r",? (?:because|since)\b.*", re.IGNORECASE | re.DOTALL)
_CLAUSE = re.compile(
    r"\b(?:because|since|if|when|before|after|but|which|where|that|then|so|unless|except|wait|actually|hmm"
    r"|as|though|although|while|be|is|are|was|were|can|cannot|unknown|unclear|known|above|below|i|we|you"
    r"|it|this|these|those|he|she|they)\b"
)
_MARKS = re.compile(r"boxed|answer|framebox|####|</?think|^\s*(?:question|q|problem)\b\W", re.IGNORECASE)
_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[a-zA-Z]+")
_WORD = re.compile(r"[a-z]{3,}", re.ASCII)
_CLOSING = re.compile(r"\W*(?:I hope (?:it|this) is correct|Q\.?E\.?D)?\W*", re.IGNORECASE)
_FENCES = re.compile(r"\$\$|\\\[|\\\]|^\s*\*+|\*+\s*$")
PHRASED_CHARACTERS: Final = 4_000  # the end of the response is looked at


def phrased_answer(response: str) -> str | None:
    """What the last sentence of a response without marks says that the answer is."""
    text = response[-PHRASED_CHARACTERS:]
    if "answer" not in text.casefold() or _ANOTHER_QUESTION.search(text):
        return None
    if "<think>" in response and "</think>" not in response:
        return None
    found = list(_PHRASE.finditer(text))
    if not found:
        return None
    said = [_said(text, match) for match in found]
    last = said[-1]
    if last is None or not _CLOSING.fullmatch(last[1]):
        return None
    answers = [last[0]]
    for match, one, after in reversed(list(zip(found[:-1], said, found[1:], strict=False))):
        between = text[match.end() : after.start()]
        if _TAKEN_BACK.search(between):
            break
        if not between.strip(" *#_\n"):  # Final answer: The final answer is 5
            continue
        if one is None:
            return None
        if one[0] not in answers:
            answers.insert(0, one[0])
    return "; ".join(answers)


def bare_answer(response: str) -> tuple[str, bool] | None:
    """A response that is an answer and nothing else, and whether words are in it; None if it is more.

    One line without a clause, a doubt, a question, or a mark that names nothing.
    """
    text = response.strip()
    if not text or len(text) > ANSWER_CHARACTERS or _MARKS.search(text) or text.endswith("?"):
        return None
    if "\n" in text and r"\begin" not in text:
        return None
    text = _FENCES.sub("", text).strip().removesuffix(".").strip()
    plain = _COMMAND.sub(" ", text).casefold()
    if (
        not text
        or _DOUBT.search(plain)
        or _TAKEN_BACK.search(plain.removeprefix("no "))
        or _CLAUSE.search(plain)
    ):
        return None
    return text, _WORD.search(plain) is not None


def _said(text: str, match: re.Match[str]) -> tuple[str, str] | None:
    """What follows a phrase to the end of its sentence, and what follows that; None if it is in doubt."""
    start = max(text.rfind(mark, 0, match.start() + 1) for mark in ".!?\n")
    if _DOUBT.search(text[start + 1 : match.end()]):
        return None
    tail = text[match.end() :].strip()
    end = _SENTENCE_END.search(tail)
    if end is not None and (end.group() == "?" or re.match(r"[\w)}]!", tail[end.start() - 1 : end.end()])):
        return None  # a question, or perhaps a factorial
    answer, rest = (tail[: end.start()], tail[end.end() :]) if end is not None else (tail, "")
    lines = [line for line in _FENCES.sub("\n", answer.strip()).split("\n") if line.strip(" *_#")]
    if r"\begin" not in answer and len(lines) > 1:
        answer, rest = lines[0], " ".join(lines[1:]) + rest
    answer = _REASON.sub("", _FENCES.sub("", answer.strip())).strip(" *_`\n")
    if not answer or answer[0] == "~" or _CLAUSE.search(TEXT.sub("", answer).casefold()):
        return None
    return answer, rest


def marked_or_last_line(response: str) -> str:
    marked = final_answer(response)
    if marked is not None:
        return marked
    stripped = response.strip()
    return stripped[stripped.rfind("\n") + 1 :].strip()


# ---- mathematical text in one form ----

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True))
_SYMBOLS = dict.fromkeys("−–‐‑﹣－", "-") | dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003", " ")
_SYMBOLS |= {"×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "°": r"^\circ "}
_SYMBOLS |= {"≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap "}
_SYMBOLS |= {"∈": r"\in ", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "％": r"\%"}
_SYMBOLS |= {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "，": ",", "．": "."}
_SYMBOLS |= {"€": r"\text{euros}", "£": r"\text{sterling}", "ℝ": r"\mathbb{R}", "∅": r"\emptyset "}
_SYMBOLS |= {"⟨": r"\langle ", "⟩": r"\rangle ", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "α": r"\alpha "}
_SYMBOLS |= {"β": r"\beta ", "λ": r"\lambda ", "φ": r"\phi ", "…": r"\ldots "}
_SYMBOLS |= {"−": "-", "“": '"', "”": '"', "’": "'", "（": "(", "）": ")", "＝": "=", "∶": ":", "：": ":"}
_DOLLAR = re.compile(r"(?<!\\)\$")
_PRICE = re.compile(r"(?<!\\)\$(?=\s*[\d.])")
_SQRT_SIGN = re.compile(r"√\s*(\(|\w+)")  # the sign with its brackets or its number
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.ASCII), new)
    for pattern, new in (
        (r"(?<!\\)\$", ""),  # a bare dollar is a delimiter, \$ a currency
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"\\\$\s*(-?[\d.,{}!\\]*\d)(?: ?(thousand|million|billion))?", r"\1 \\text{\2 dollars}"),
        (r"\\\$", ""),
        (r"\\text\{ ?(euros|sterling)\}\s*(\d[\d.,]*)", r"\2 \\text{\1}"),
        (r"^(?:USD|US) ?(?=\d)([\d.,]*\d)$", r"\1 \\text{dollars}"),
        (r"^\](.+)\]$", r"(\1]"),  # ]2,5] as in France
        (r"^\[([^\[\]]+)\[$", r"[\1)"),
        (r"^\]([^\[\]]+)\[$", r"(\1)"),
        (r"\s*(?:\\(?:checkmark|blacksquare|square|Box|qed)(?![a-zA-Z])|[✓✔∎□■])\s*$", ""),
        (r"\\mathbb\s*\{?\s*R\s*\}?\s*_\{?\s*\\ge(?:q|qslant)?\s*0\s*\}?", r"[0,\\infty)"),
        (r"\\mathbb\s*\{?\s*R\s*\}?\s*(?:\^\{?\+\}?|_\{?\s*>\s*0\s*\}?)", r"(0,\\infty)"),
        (r"^([a-zA-Z])\s*\\approx", r"\1="),
        (r"\\overline\s*\{\s*([A-Z]{2})\s*\}", r"\1"),
        (r"[,;]?\s*(?:\\q?quad|\\,)?\s*[a-z]\s*\\in\s*\\mathbb\s*\{?\s*Z\s*\}?\s*$", ""),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\!|(?<![\\a-zA-Z])\{\}", ""),
        (r"\\(?:h?phantom|hspace|vspace)\*?\s*(?:\{[^{}]*\}|[-+])", ""),
        (r"(?<=\d)\{,\}(?=\d)", ","),
        (r"(?<=\d)\\,(?=\d{3}(?!\d))", " "),
        (r"(?<=\d),\s+(?=[-+.\d])", ";"),  # 1, 234 is a list, 1,234 a number
        (
            r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\\(?:thinspace|enspace|hfill|par|newline)(?![a-zA-Z])",
            " ",
        ),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\[dt]?binom\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])", r"\\binom{\1}{\2}"),
        (r"\\log\s*_\s*(\d)", r"\\log_{\1}"),
        (r"(?<=\d)\s*[xX]\s*(?=10\^)", r"\\times "),
        (r"(\d+)\s*(?:\\text\{\s*out of\s*\}|out of)\s*(\d+)", r"\\frac{\1}{\2}"),
        (r"\\text\{\s*(?:negative|minus)\s*\}\s*(?=\d)", "-"),
        (r"\\text\{\s*([0-9A-F]+)\s*\}(?=_)", r"\1"),
        (r"\\(?:hat|vec|widehat|overrightarrow)\s*\{?\s*(?:\\([ij])math|([ijk]))(?![a-z])\s*\}?", r"\1\2"),
        (r"\\pmod\s*\{?\s*(\d+)\s*\}?", r"\\pmod{\1}"),
        (r"\(?\\(?:text|mathrm)\{\s*mod\s+(\d+)\s*\}\)?", r"\\pmod{\1}"),
        (r"^([a-zA-Z])\s*\\equiv\s*", ""),
        (r"\\frac\s*([0-9a-zA-Z]|\\pi)", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})\s*([0-9a-zA-Z]|\\pi)", r"\1{\2}"),
        (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\^\s*(\d+|[a-zA-Z])", r"^{\1}"),
        (r"^\s*\\approx", ""),
        (r"(?<=.)\s*\\(?:approx|simeq)\s*-?[\d.,]+\s*$", ""),  # 6\sqrt{3} \approx 10.39 says 6\sqrt{3}
        (
            r"\\(?:textbf|textit|textrm|textnormal|textsf|texttt|emph|mbox|mathrm|mathbf|mathit|mathsf"
            r"|operatorname|hbox|bf|rm|text)\*?\s*\{",
            r"\\text{",
        ),
        (r"\\text\{\s*\\text\{([^{}]*)\}\s*\}", r"\\text{\1}"),
        (r"\\text\{\s*\}", ""),
        (r"^(?:\\(?:therefore|Rightarrow|implies|Longrightarrow)(?![a-zA-Z])\s*)+", ""),
        (
            r"\\frac\{\s*\\text\{\s*(\w+)\s*\}\s*\}\{\s*\\text\{\s*(\w+)\s*\}(\^\{?\d\}?)?\s*\}",
            r"\\text{\1/\2}\3",
        ),
        (
            r"\\text\{\s*([a-zA-Z]+)\s*\}\s*(?:\\cdot\s*)?\\text\{\s*([a-zA-Z]+)\s*\}\^\{-1\}",
            r"\\text{\1/\2}",
        ),
        (r"\\text\{\s*([a-zA-Z]+)\s*(?:\\cdot|\.|\s)\s*([a-zA-Z]+)\^\{?-1\}?\s*\}", r"\\text{\1/\2}"),
        (r"^\\text\{\s*(?:DNE|D\.N\.E\.?)\s*\}$|^DNE$", r"\\text{does not exist}"),
        (r"\\text\{\s*(?:positive )?infinity\s*\}|^infinity$", r"\\infty"),
        (r"^\\text\{\s*(?:(?:there (?:are|is)|(?:in )?(?:the )?year|(?:a )?total of) ?)\s*\}", ""),
        (r"\\text\{\s*([iejk])\s*\}", r"\1"),
        (r"\\text\{\s*([-+]?[\d.]+ [^{}]*)\}$", r"\1"),  # \text{10 meters}
        (r"\\(?:text)?color\s*\{\w+\}|\\underline(?=\{)", ""),
        (r"\\(?:bf|rm|it|large|Large|LARGE|huge|Huge|normalsize|textstyle|scriptstyle)(?![a-zA-Z])", ""),
        (r"\\log_\{?e\}?", r"\\ln "),
        (r"\.\.\.", r"\\ldots "),
        (r"\\{1,2}\s*$", ""),
        (r"\\text\{\s*(\\%)\s*\}", r"\1"),
        (r"^\\text\{[A-Za-z ]+:\s*\}", ""),  # \text{Total: }5
        (r"\\text\{\s*([-+\d.,/ ]*\d)\s*\}", r"\1"),
        (r"\\text\{([^{}]*?)\^\{?([23])\}?\s*\}", r"\\text{\1}^{\2}"),  # \text{cm^2}
        (r"(?<=\d)(?:\^\{?)?\s*\\text\{(?:st|nd|rd|th)\}\}?", ""),
        (r"(?<=\d)(?:\^\{(?:st|nd|rd|th)\}|(?:st|nd|rd|th)\b)", ""),
        (r"\\[lL]angle(?![a-zA-Z])", "("),
        (r"\\[rR]angle(?![a-zA-Z])", ")"),
        (r"\\(?:varnothing|emptyset)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\(?:lbrace|lbrack)(?![a-zA-Z])", r"\\{"),
        (r"\\(?:rbrace|rbrack)(?![a-zA-Z])", r"\\}"),
        (r"\\(?:mathbb|Bbb)\s*\{?\s*R\s*\}?|\\R(?![a-zA-Z])", r"(-\\infty,\\infty)"),
        (r"\\(?:lt)(?![a-zA-Z])", "<"),
        (r"\\(?:gt)(?![a-zA-Z])", ">"),
        (r"<=", r"\\leq "),
        (r">=", r"\\geq "),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])(pi|infty|infinity|sqrt)(?![a-zA-Z])(?!\s*[a-z])", r"\\\1 "),
        (r"\\infinity", r"\\infty"),
        (r"\*\*", "^"),
        (r"(?<=[\w)}])\*(?=[\w(\\])", r"\\cdot "),
        (r"\\prime(?![a-zA-Z])", "'"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree", r"^\\circ "),
        (r"(?<!\\)%", r"\\%"),
        (r"\\(?:le|leqslant)(?![a-zA-Z])", r"\\leq"),
        (r"\\(?:ge|geqslant)(?![a-zA-Z])", r"\\geq"),
        (r"\\(?:ne)(?![a-zA-Z])", r"\\neq"),
    )
)
_SPACE = re.compile(r"\s+")
_LEAD_IN = re.compile(
    r"^(?:\\text\s*\{)?\s*(?:(?:so|thus|therefore|hence),? )?(?:the |my )?(?:final |correct )?answer"
    r"(?: is:?|:|=)\s*\}?\s*",
    re.IGNORECASE,
)
_MARKDOWN = re.compile(r"^(\*\*\*|\*\*|\*|__|`+)(?=\S)(.*?)(?<=\S)\1$", re.DOTALL)
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")


def normalise(text: str) -> str:
    r"""One spelling of the same mathematics: no delimiters, no layout, `\frac{a}{b}`, ASCII digits.

    A space stays where it parts two letters or digits: `1 2` is not 12.
    """
    text = text.strip()
    if not text.isascii():
        text = _to_ascii(text)
    for _ in range(4):  # \boxed{\boxed{5}}, \text{\boxed{5}}, **the answer is \boxed{5}**
        inner = last_boxed(text)
        text = _unwrapped(text)
        bare = _LEAD_IN.sub("", _MARKDOWN.sub(r"\2", text if inner is None else inner)).strip()
        if bare == text:
            break
        text = bare
    if len(_DOLLAR.findall(text)) % 2:  # a price such as $18, not a pair of delimiters
        text = _PRICE.sub(r"\\$", text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _SPACE.sub(" ", text).strip().rstrip(".,;:").strip()
    spaced = TEXT.sub(lambda match: rf"\text{{{match.group(1).strip(' .,;:')}}}", text)
    return _strip_round_brackets(_LOOSE_SPACE.sub("", spaced))


_WRAPPED = re.compile(
    r"^(\\(?:mathbf|boldsymbol|bm|pmb|mathrm|mathit|mathsf|ensuremath)|\\(?:text|textbf|textrm|emph)|)"
    r"\s*\{(.*)\}$",
    re.DOTALL,
)
_FORMULA = re.compile(r"\\(?!text|mathrm|mbox|q?quad)[a-zA-Z]{2,}|\$")


def _unwrapped(text: str) -> str:
    r"""`{5}`, `\mathbf{\frac{1}{2}}` and `\text{$x$}` without the braces and the font; words keep it."""
    match = _WRAPPED.match(text)
    if match is None:
        return text
    font, inner = match.groups()
    if font.startswith((r"\text", r"\emph")) and not _FORMULA.search(inner):
        return text
    if re.fullmatch("[A-Za-z ]*", inner) if font else re.search(r"\\(?:choose|over|atop)(?![a-z])", inner):
        return text
    depth = 0
    for token in _BRACES.findall(inner):
        depth += token.endswith("{") and token != r"\{"
        depth -= token == "}"
        if depth < 0:  # the first brace closes before the end
            return text
    return inner.strip() if not depth else text


def _to_ascii(text: str) -> str:
    parts: list[str] = []
    raised = False
    for character in text:
        if character in _SUPERSCRIPTS:
            parts.append(("" if raised else "^{") + _SUPERSCRIPTS[character])
            raised = True
            continue
        if raised:
            parts.append("}")
            raised = False
        if unicodedata.category(character) == "Cf":  # a byte order mark, a zero-width space
            continue
        if character.isdecimal():
            parts.append(str(unicodedata.digit(character)))
        else:
            parts.append(_SYMBOLS.get(character, character))
    text = "".join(parts) + ("}" if raised else "")
    return _SQRT_SIGN.sub(lambda m: r"\sqrt" + (m[1] if m[1] == "(" else f"{{{m[1]}}}"), text)


def _strip_round_brackets(text: str) -> str:
    """`(((5)))` is 5; `(1,2)` and `(1)(2)` stay."""
    while len(text) > 2 and text[0] == "(" and text[-1] == ")" and not set(",;") & set(text):
        depths = list(itertools.accumulate((c == "(") - (c == ")") for c in text))
        if 0 in depths[:-1]:
            break
        text = text[1:-1].strip()
    return text
