"""Are two answers equal? Words as words, roles by name, numbers as numbers, else math-verify."""

import re
import unicodedata
from collections.abc import Callable
from unittest import mock

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import grader

LONGEST = 2000  # characters of an answer; a longer one is wrong
STRICT = [  # math-verify reads all of an answer or nothing: it finds no number in a text, drops no word
    math_verify.LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    )
]

# Notation -----------------------------------------------------------------------------------------

SCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789+-n0123456789")
LATEX = (
    r"\times |\div |\sqrt|\sqrt[3]|^\circ |\infty |\approx |\pm |\cup |\cap |\in |\emptyset |\le |\ge |\ne |"
    r"\cdot |\cdot |\cdot |*|/|-|-|-"
)
SIGNS = dict(zip("×÷√∛°∞≈±∪∩∈∅≤≥≠·⋅∙∗⁄−–—", LATEX.split("|"), strict=True))
FONT = r"\\(?:text\w*|math(?:rm|bf|it|sf)|[mhf]box|boxed)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
SPACE = r"(?:\\[,;:! ]|\\q?quad\b|\\thinspace\b|~|\s)+"
FUNCTIONS = "pi|ln|log|exp|sin|cos|tan|arcsin|arccos|arctan|sinh|cosh|tanh|alpha|beta|theta|lambda|infty"
MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
CODES = "USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD|Rs|US|CA|AU"
NO_UNIT = (  # words behind a number that change what it says
    "or|and|not|no|more|less|fewer|least|most|than|if|when|where|for|all|any|except|unless|mod|modulo|between|to|from|"
    "plus|minus|times|over|under|above|below|choose|squared|cubed|factorial|dozen|hal(?:f|ves)|thirds?|quarters?|"
    r"fourths?|fifths?|\w*(?:ten|hundred|thousand)ths?|hundreds?|thousands?|millions?|billions?|trillions?|is|are|was|"
    "only|with|without|up|down|negative|positive|base|higher|lower|greater|larger|smaller|exactly|approximately"
)
UNITS = (  # that may stand right behind a number; single letters are variables there
    "[kcmnμ]m|[kmμ]g|m[lL]|lbs?|oz|ft|yd|mi|hrs?|min|secs?|ms|[mk]ph|kmh|[kcm]?m/h(?:r|our)?|[kc]?m/s|rad|deg|mol|"
    f"[kMG]?Hz|[kM]?Pa|[kM][JNVW]|k?Wh|[kMG]?eV|erg|AU|k?pc|Mpc|cc|k?cal|{CODES}"
)
WORD = rf"(?!(?:{NO_UNIT})\b)(?=[^\W\d_]{{2}})(?:[^\W\d_]*[eioEIO][^\W\d_]*|[^\W\d_]{{4,}})"
POWER = r"(?: ?\^ ?\{?-?\d\}?)?"
UNIT = re.compile(
    rf"(?:(?<=[\d)}}.])|(?<=\\pi))(?: (?:{WORD}|[mgshlLNJWVK])| ?-?(?:{UNITS}))(?![^\W\d_]){POWER}"
    rf"(?:(?: ?(?:/|\\cdot|\*|-) ?| )\(?(?:{WORD}|{UNITS}|per|[mgshlLNJWVKA])(?![^\W\d_]){POWER}\)?)*$"
)
COUNTERS = "元|米|厘米|公里|个|人|块|岁|天|小时|分钟|秒|克|千克|度|次|本|页|枚|円|美元|원|명|개"


def mixed(match: re.Match) -> str:
    """`5 1/2` is 11/2; `5 3/2` is nothing that can be read."""
    return rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}" if int(match[2]) < int(match[3]) else " @ "


TYPE = (  # how it is set, which holds for words too
    (r"[¼-¾⅐-⅞]", lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄"))),
    (r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(SCRIPTS)}}}"),
    (r"[₀-₉]+", lambda m: f"_{{{m[0].translate(SCRIPTS)}}}"),
    (r"(?s).+", lambda m: unicodedata.normalize("NFKC", m[0])),  # full-width digits, no-break spaces
    (f"[{''.join(SIGNS)}]", lambda m: SIGNS[m[0]]),
    (FONT, r" \1 "),
    (FONT, r" \1 "),  # one in another
    (r"\\(?:displaystyle|textstyle|(?:left|right|[bB]igg?[lr]?)(?![a-z]))|\\[()\[\]]|(?<!\\)\$", ""),
    (r"^\s*\*\*(.*)\*\*\s*$", r"\1"),  # bold
    (SPACE, " "),
    (r"(?<=[^.\s]) ?[.。] *$", ""),  # the end of a sentence
)
NOTATION = (  # what math-verify reads otherwise, or not at all
    (r"(?<![\d.,])\d{1,3}(?:(?:\{,\}| )\d{3})+(?!\d| ?/| \d)", lambda m: re.sub(r"\D", "", m[0])),
    (rf"\\\$|[€£¥₹₩₽₪₫฿¢]|\\(?:pounds|euro)\b|(?<![a-zA-Z])(?:{CODES})\b\.? ?(?=-?\\?[\d$€£¥])", ""),
    (r"(?<![a-zA-Z])(?:US|CA|AU|HK|Rs\.?)(?=-?\d)", ""),
    (r"(?<!\\)%| ?\b[Pp]er ?cent(?:age)?\b| ?\bpct\b", r"\\%"),
    (r"^ ?(?:approximately|approx\.?|about|roughly|\\approx) ?", ""),
    (r"(?<![\w\\.])(\d[\d,]*)[eE]([+-]?\d{1,4})(?!\w|\.\d)", r"(\1.0\\times 10^{\2})"),  # a decimal
    (r"(?<![\w\\.])(\d[\d,]*\.\d*|\.\d+)[eE]([+-]?\d{1,4})(?!\w|\.\d)", r"(\1\\times 10^{\2})"),
    (r"(?<=\d) ?[xX] ?(?=10 ?\^)", r"\\times "),
    (r"(?<![\d.,/^_{}\w\\)])(\d{1,20}) (\d{1,20}) ?/ ?(\d{1,20})(?![\d.])", mixed),
    (r"(?<=\d) +(?=[\d.])", " @ "),  # two numbers, which it would add
    (r"(?<=[\d}]) ?i(?![a-zA-Z])", " i"),  # alone it is the imaginary unit
    (r"\*\*", "^"),
    (r"\^ ?([+-]?\d+)", r"^{\1}"),
    (rf"(?<![\\a-zA-Z])({FUNCTIONS})(?![a-zA-Z])", r"\\\1 "),
    (r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
    (r"(?<![\\a-zA-Z])sqrt(?=[ \d({])", r"\\sqrt"),
    (r"(\\sqrt(?:\[3\])?) ?\(((?:[^()]|\([^()]*\))*)\)", r"\1{\2}"),
    (r"(\\sqrt(?:\[3\])?) ?(\d+(?:\.\d+)?|[a-zA-Zπ]|\\pi)", r"\1{\2}"),
    (r"(?<=[\d)}]) ?\^ ?\{? ?\\circ ?\}? ?[CF]?(?![a-zA-Z])", ""),
    (r"(?<=\d) ?\^ ?\{ ?(?:st|nd|rd|th) ?\}|(?<=\d)(?:st|nd|rd|th)$", ""),
    (rf"(?<=\d) ?({'|'.join(MULTIPLES)})\b", lambda m: rf"\times 10^{{{MULTIPLES[m[1]]}}}"),
    (r" for (?:all|any|every) (?:real )?[a-z](?: ?\\in ?\\mathbb ?\{R\})?$", ""),
    (rf"(?<=\d) ?(?:{COUNTERS})+$", ""),
    (r"^ | $", ""),
)


TYPE, NOTATION = ([(re.compile(pattern), new) for pattern, new in rows] for rows in (TYPE, NOTATION))


def rewritten(text: str, rows: list[tuple[re.Pattern, str | Callable]]) -> str:
    """A text after every row of a table, in order."""
    for pattern, replacement in rows:
        text = pattern.sub(replacement, text)
    return text.strip()


def has_variable(text: str) -> bool:
    """Whether an answer has letters, but for commands and the left side of an equation."""
    return bool(re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+|^[a-zA-Z]\w* ?=", "", text)))


def latex(text: str, letter_is_unit: bool) -> str:
    """An answer for math-verify, without its unit; one letter right behind a number may be one."""
    text = rewritten(text, NOTATION)
    unit = UNIT.search(text) or (re.search(r"(?<=\d)[mgshlL]$", text) if letter_is_unit else None)
    return text[: unit.start()] if unit and not has_variable(text[: unit.start()]) else text


# Words, letters and roles -------------------------------------------------------------------------

LETTER = re.compile(r"(?:(?i:option|choice|answer) )?\(?([A-J])(?:\)|(?=[.:]|$))[ .:]*(?!(?:and|or)\b|[,;&/])(.*)")
BASED = re.compile(r"\(?((?=[A-F]*\d)[0-9A-Fa-f]+)\)? ?_ ?\{? ?\(?([0-9]+|[a-z]{3,})\)? ?\}?")
SEPARATOR = re.compile(r"\\[{}]|[()\[\]{}]|,(?!\d{3}(?!\d))|(?<!\d),|;|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])")
WHOLE = re.compile(r"\\[lcv]?dots|\.\.\.")  # in a list that math-verify compares as a whole
GOLD_ROLE = re.compile(r"(?:\(?\d+[.):]+)? *([^\W\d_]+) is an? (knight|knave)", re.IGNORECASE)
FILLING = set("a an and are both is the so thus while therefore hence also of all others none".split())


def parts(text: str) -> list[str]:
    """What commas, semicolons, `and` and `or` divide outside of brackets, or inside of a set's."""
    inside = re.fullmatch(r"\\\{(?!.*\\\{)(.*)\\\}|\{([^{}]*)\}", text)
    text = (inside[1] or inside[2] or "") if inside else text
    depth, start, found = 0, 0, []
    for mark in SEPARATOR.finditer(text):
        if mark[0][-1] in "()[]{}":
            depth += 1 if mark[0][-1] in "([{" else -1
        elif depth == 0:
            found.append(text[start : mark.start()])
            start = mark.end()
    found = [part.strip() for part in (*found, text[start:]) if part.strip()]
    return [part.replace(r"\pm", sign) for part in found for sign in ("+-" if part.count(r"\pm") == 1 else "+")]


def product(word: str) -> bool:
    """Whether letters are a product, as `xy` and `abc` are, and not a word: `no`, `cat`, `AC`."""
    spelled = re.search(r"[eio]", word.lower()) or re.fullmatch(r"[^au][au][^au]", word.lower())
    return len(word) == 1 or (len(word) < 4 and not spelled and not re.fullmatch(r"[A-J]+|[A-Z][a-z]+", word))


def words(text: str) -> list[str] | None:
    """An answer in words, in lower case; None where it is mathematics."""
    if not re.fullmatch(r"[^\W\d_]+(?:['’ -]+[^\W\d_]+)*", text):
        return None
    found = re.split(r"['’ -]+", text)
    named = {*FUNCTIONS.split("|"), "infinity", "inf", "oo"} & set(found)
    return None if named or all(map(product, found)) else [word.casefold() for word in found]


def is_words(gold: str | dict) -> bool:
    """Whether a gold is compared as words."""
    return isinstance(gold, str) and len(gold) <= LONGEST and words(rewritten(gold, TYPE)) is not None


def letter(text: str) -> str | None:
    """The choice of `E`, `(E)`, `E) 12` or `E: text`; None without one or with two."""
    found = LETTER.fullmatch(text)
    return found[1] if found and not re.search(r"(?:^|[ (])[A-J](?:[).:]|$)", found[2]) else None


def roles(gold: str) -> dict[str, str]:
    """{name: role} of a gold of Knights and Knaves; empty for any other."""
    lines = [GOLD_ROLE.fullmatch(line.strip(" .")) for line in re.split(r"[\n,;]|\band\b", gold) if line.strip()]
    return {line[1].lower(): line[2].lower() for line in lines} if lines and all(lines) else {}


def said_roles(text: str, names: set[str]) -> dict[str, str]:
    """{name: role}: a role is that of the names before it, in `Knights: ...` of those after it.

    Empty where a word is neither, or a name has two roles or none.
    """
    text = re.sub(r"\\(?:begin|end) ?\{\w+\*?\}(?:\{[lcr| ]*\})?|\\(?!text|math)[a-zA-Z]+", " ", text)
    said = re.findall(r"[^\W\d_]+", rewritten(text, TYPE).lower())
    said = [re.sub("^(knight|knave)s$", r"\1", word) for word in said if word not in FILLING]
    behind = bool(said) and said[0] in names
    found, role, before = {}, "", ""
    for word in reversed(said) if behind else said:
        if word in ("knight", "knave"):
            if behind and before in ("knight", "knave"):
                return {}
            role = word
        elif word not in names or found.setdefault(word, role) != role:
            return {}
        before = word
    return found


# Comparing ----------------------------------------------------------------------------------------
def close(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two values are equal, where one holds a decimal to a relative 1e-6."""
    decimal = a.has(sympy.Float) or b.has(sympy.Float)
    a, b = (x.xreplace({f: sympy.Rational(str(f)) for f in x.atoms(sympy.Float)}).doit() for x in (a, b))
    if a == b or a.free_symbols or b.free_symbols:
        return a == b or (decimal and sympy.simplify(a - b) == 0)
    if a.is_infinite or b.is_infinite:
        return False
    if a.is_Rational and b.is_Rational:
        return decimal and bool(abs(a - b) <= max(abs(a), abs(b)) / 10**6)
    gap, sizes = abs((a - b).evalf(50)), [abs(x.evalf(50)) for x in (a, b)]
    return bool(gap <= max(sizes) * (1e-6 if decimal else 1e-25))


def equal_values(a: sympy.Basic, b: sympy.Basic, *rounding: int) -> bool:
    """In place of math-verify's: it rounds to 6 decimals. 28 % is 28 and 0.28."""
    if isinstance(a, (sympy.MatrixBase, sympy.MatrixExpr)):
        return VALUES(a, b, *rounding)
    bare_a, bare_b = grader.get_pct_val(a), grader.get_pct_val(b)
    if bare_a is not None and bare_b is not None:
        return close(bare_a, bare_b)
    ways = [(a, b), (bare_a, b), (a, bare_b)]
    return any(close(x, y) for x, y in ways if x is not None and y is not None)


VALUES = grader.sympy_numeric_eq


def parse(text: str) -> list:
    """What math-verify reads in an answer, strictly: the value, or nothing."""
    options = {"fallback_mode": "no_fallback", "extraction_mode": "first_match", "parsing_timeout": None}
    return math_verify.parse(f"${text}$", STRICT, **options)


def equal_part(gold: str, said: str) -> bool:
    """Whether a part of an answer is that of the gold."""
    if words(gold) is not None:
        return words(gold) == words(said)
    if letter(gold) and len(gold.strip("() ")) == 1 and letter(said):
        return letter(gold) == letter(said)
    based = [BASED.fullmatch(text) for text in (gold, said)]
    if all(based):
        return len({(number[1].lstrip("0").upper(), number[2]) for number in based}) == 1
    gold, said = (number[1] if number else text for number, text in zip(based, (gold, said), strict=True))
    wanted = latex(gold, False)
    with mock.patch.object(grader, "sympy_numeric_eq", equal_values):
        read = parse(wanted), parse(latex(said, not has_variable(wanted)))
        return bool(grader.verify(*read, timeout_seconds=None))


def equal(gold: str, said: str) -> bool:
    """Whether an answer is the gold; of two lists each part must have its own, in any order."""
    if max(len(gold), len(said)) > LONGEST:
        return False
    if who := roles(gold):
        return said_roles(said, set(who)) == who
    gold, said = rewritten(gold, TYPE), rewritten(said, TYPE)
    wanted, left = parts(gold), parts(said)
    if WHOLE.search(gold) or len(wanted) != len(left) or len(wanted) < 2:
        repeats = len(wanted) > 1 and len(set(wanted)) < len(wanted)
        return not (repeats and len(wanted) != len(left)) and equal_part(gold, said)
    for part in wanted:
        match = next((other for other in left if equal_part(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True
