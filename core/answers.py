"""Are two answers equal? Words as words, roles by name, numbers as numbers, else math-verify."""

import re
import unicodedata
from collections.abc import Callable
from unittest import mock

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import grader

LONGEST = 2000  # characters of an answer; a longer one is wrong
NORMAL = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
VALUES = grader.sympy_numeric_eq

# Notation -----------------------------------------------------------------------------------------
LATEX = (
    r"\times |\div |\sqrt|\sqrt[3]|^\circ |\infty |\approx |\pm |\cup |\cap |\in |\emptyset |\le |\ge |\ne |"
    r"\cdot |\cdot |\cdot |*|/|-|-|-"
)
SIGNS = dict(zip("×÷√∛°∞≈±∪∩∈∅≤≥≠·⋅∙∗⁄−–—", LATEX.split("|"), strict=True))
FONT = r"\\(?:text\w*|math(?:rm|bf|it|sf)|[mhf]box|boxed)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
FUNCTIONS = "pi|ln|log|exp|sqrt|sin|cos|tan|arcsin|arccos|arctan|sinh|cosh|tanh|alpha|beta|theta|lambda|infty"
MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
CODES = "USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD|Rs|US|CA|AU|HK"
NO_UNIT = (  # words behind a number that change what it says
    "or|and|not|no|more|less|fewer|least|most|than|if|when|where|for|all|any|except|unless|mod|modulo|between|to|from|"
    "plus|minus|times|over|under|above|below|choose|squared|cubed|factorial|dozen|hal(?:f|ves)|thirds?|quarters?|"
    r"fourths?|fifths?|\w*(?:ten|hundred|thousand)ths?|hundreds?|thousands?|millions?|billions?|trillions?|is|are|was|"
    "only|with|without|up|down|negative|positive|base|higher|lower|greater|larger|smaller|exactly|approximately"
)
UNITS = (  # that may stand right behind a number; single letters are variables there
    "[kcmnμ]m|[kmμ]g|m[lL]|lbs?|oz|ft|yd|mi|hrs?|min|secs?|ms|[mk]ph|kmh|[kcm]?m/h(?:r|our)?|[kc]?m/s|rad|deg|mol|"
    f"[kMG]?Hz|[kM]?Pa|[kM][JNVW]|k?Wh|[kMG]?eV|erg|AU|k?pc|Mpc|cc|k?cal|{CODES}|"
    "(?:元|米|厘米|公里|个|人|块|岁|天|小时|分钟|秒|克|千克|度|次|本|页|枚|円|美元|원|명|개)+"
)
WORD = rf"(?!(?:{NO_UNIT})\b)(?=[^\W\d_]{{2}})(?:[^\W\d_]*[eioEIO][^\W\d_]*|[^\W\d_]{{4,}})"
POWER = r"(?: ?\^ ?\{?-?\d\}?)?"
UNIT = re.compile(
    rf"(?:(?<=[\d)}}.])|(?<=\\pi))(?: (?:{WORD}|[mgshlLNJWVK])| ?-?(?:{UNITS}))(?![^\W\d_]){POWER}"
    rf"(?:(?: ?(?:/|\\cdot|\*|-) ?| )\(?(?:{WORD}|{UNITS}|per|[mgshlLNJWVKA])(?![^\W\d_]){POWER}\)?)*$"
)
TYPE = (  # how it is set, which holds for words too
    (r"[¼-¾⅐-⅞]", lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄"))),
    (r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}"),
    (r"[₀-₉]+", r"_{\g<0>}"),
    (r"(?s).+", lambda m: unicodedata.normalize("NFKC", m[0])),  # full-width and raised digits, no-break spaces
    (f"[{''.join(SIGNS)}]", lambda m: SIGNS[m[0]]),
    (FONT, r" \1 "),
    (FONT, r" \1 "),  # one in another
    (r"\\(?:displaystyle|textstyle|(?:left|right|[bB]igg?[lr]?)(?![a-z]))|\\[()\[\]]|(?<!\\)\$", ""),
    (r"^\s*\*\*(.*)\*\*\s*$", r"\1"),  # bold
    (r"\\[lc]?dots(?![a-z])|\.{3}", r"\\ldots "),
    (r"(?:\\[,;:! ]|\\q?quad\b|\\thinspace\b|~|\s)+", " "),
    (r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
    (r"(?<=[^.\s]) ?[.。] *$", ""),  # the end of a sentence
)
NOTATION = (  # what math-verify reads otherwise, or not at all
    (r"(?<![\d.,])\d{1,3}(?:(?:\{,\}| )\d{3})+(?!\d| ?/| \d)", lambda m: re.sub(r"\D", "", m[0])),
    (rf"\\\$|[€£¥₹₩₽₪₫฿¢]|\\(?:pounds|euro)\b|(?<![a-zA-Z])(?:{CODES})\.? ?(?=-?\\?[\d$€£¥])", ""),
    (r" ?\b[Pp]er ?cent(?:age)?\b| ?\bpct\b", r"\\%"),
    (r"^ ?(?:approximately|approx\.?|about|roughly|\\approx) ?", ""),
    # with 1.0, so that it is compared as a decimal
    (r"(?<![\w\\.])(?<!\d,)(\d[\d,]*(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,4})(?!\w|\.\d)", r"(1.0\\times \1\\times 10^{\2})"),
    (r"(?<=\d) ?[xX] ?(?=10 ?\^)", r"\\times "),
    (
        r"(?<![\d.,/^_{}\w\\)])(\d{1,20}) (\d{1,20}) ?/ ?(\d{1,20})(?![\d.])",
        lambda m: rf"{m[1]}\frac{{{m[2]}}}{{{m[3]}}}" if int(m[2]) < int(m[3]) else m[0],
    ),  # mixed
    (r"(?<=\d) +(?=[\d.])", " @ "),  # two numbers, which it would add
    (r"((?<![\w.^])\d+|\)) ?(?=\(|\\[dt]?binom)|\) ?(?=\d)", r"\g<0>\\cdot "),  # 2(3) is no mixed number
    (r"\\boxed|(?<![\\a-zA-Z])(?:if|when|unless|except|not|no|only)(?![a-zA-Z])", " @ "),
    (r"(?<=[\d}]) ?i(?![a-zA-Z])", " i"),  # alone it is the imaginary unit
    (r"\*\*", "^"),
    (r"\^ ?([+-]?\d+)", r"^{\1}"),
    (rf"(?<![\\a-zA-Z])({FUNCTIONS})(?![a-zA-Z])", r"\\\1 "),
    (r"(\\sqrt(?:\[3\])?) ?(?:\(((?:[^()]|\([^()]*\))*)\)|(\d+(?:\.\d+)?|[a-zA-Zπ]|\\pi))", r"\1{\2\3}"),
    (r"(?<=[\d)}]) ?\^ ?\{? ?\\circ ?\}? ?[CF]?(?![a-zA-Z])", ""),
    (r"(?<=\d) ?\^ ?\{ ?(?:st|nd|rd|th) ?\}|(?<=\d)(?:st|nd|rd|th)$", ""),
    (rf"(?<=\d) ?({'|'.join(MULTIPLES)})\b", lambda m: rf"\times 10^{{{MULTIPLES[m[1]]}}}"),
)


def rewritten(text: str, rows: tuple[tuple[str, str | Callable], ...]) -> str:
    """A text after every row of a table, in order."""
    for pattern, replacement in rows:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def has_variable(text: str) -> bool:
    """Whether an answer has letters, but for commands and the left side of an equation."""
    return bool(re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+|^[a-zA-Z]\w* ?=", "", text)))


def latex(text: str, letter_is_unit: bool) -> str:
    """An answer for math-verify, without its unit; one letter right behind a number may be one."""
    text = rewritten(text, NOTATION)
    unit = UNIT.search(text) or (re.search(r"(?<=\d)[mgshlL]$", text) if letter_is_unit else None)
    return text[: unit.start()] if unit and not has_variable(text[: unit.start()]) else text


# Reading ------------------------------------------------------------------------------------------
LOST = re.compile(  # what the parser drops, or takes for a product: equal only where it is written alike
    r"(?<=[a-zA-Z)}])'|\\ldots|⊕|\d\)? ?_|\^ ?\{? ?T(?![a-z])|\.\d+\.\d|%.*\w|:.*:|(?<!\d)0[xX][0-9A-F]|"
    r"\\frac ?\{ ?(?:d|\\partial)[^{}]*\} ?\{ ?(?:d|\\partial) ?[a-zA-Z]|"  # a derivative
    r"(?<![\\a-zA-Z])(?:[a-zA-Z]{3,}|[A-Z][a-z]|re|im) ?\("  # a call
)
BARE = ((r"\s", ""), (r"\{(\w)\}", r"\1"))


def solve(*equation: sympy.Basic) -> list:
    """In place of math-verify's: equations without a solution are not equal for that."""
    return sympy.solve(*equation) or [sympy.Dummy()]


def read(text: str) -> list[sympy.Basic]:
    """An answer as sympy has it, in a list; [] where the parser cannot read all of it."""
    text = normalize_latex(text, NORMAL)
    try:
        found = latex2sympy(text, is_real=not grader.should_treat_as_complex(text), normalization_config=None)
        return [] if contradicts(found) else [found]
    except Exception:  # of many kinds, by which the parser says that it expected something else
        return []


def contradicts(found: sympy.Basic) -> bool:
    """Whether an answer equates two numbers over 1 % apart, as `2 + 2 = 5` does."""
    numbers = isinstance(found, sympy.Eq) and all(side.is_number for side in found.args)
    if not numbers or found.has(sympy.Function, sympy.NumberSymbol):  # which may be in degrees
        return False
    return bool(abs(found.lhs - found.rhs).evalf() > 0.01 * abs(found.rhs).evalf())


# Words, letters and roles -------------------------------------------------------------------------
CHOICE = re.compile(  # `E`, `(E)`, `E) 12` or `E: text`, but not with a second letter behind it
    r"(?:(?i:option|choice|answer) )?\(?([A-J])(?:\)|(?=[.:]|$))"
    r"(?![ .:]*(?:(?:and|or)\b|[,;&/]|(?:.*[ (])?[A-J](?:[).:]|$))).*"
)
BASED = re.compile(r"\(?((?=[A-F]*\d)[0-9A-Fa-f]+)\)? ?_ ?\{? ?\(?([0-9]+|[a-z]{3,})\)? ?\}?")
SEPARATOR = re.compile(r"\\[{}]|[()\[\]{}]|,(?!\d{3}(?!\d))|(?<!\d),|;|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])")
ROLES = ("knight", "knave")
IS_ROLE = re.compile(r"(?i) is an? (?:knight|knave)\b")
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


def is_words(gold: str | dict) -> bool:
    """Whether a gold is words, or names and who they are, and no mathematics."""
    if not isinstance(gold, str) or len(gold) > LONGEST or gold.upper() == gold.lower():
        return False
    found = re.split(r"['’ -]+", rewritten(gold, TYPE))
    letters = all(re.fullmatch(r"[^\W\d_]+", word) for word in found) and not {*FUNCTIONS.split("|")} & {*found}
    return bool(IS_ROLE.search(gold)) or (letters and not all(map(product, found)))


def roles(text: str) -> set[tuple[str, str]]:
    """(name, role) of each name: the role behind it, in `Knights: ...` the one before it.

    Every word that fills no sentence is a name: `not` and `or` are names that no gold has.
    """
    text = re.sub(r"\\(?:begin|end) ?\{\w+\*?\}(?:\{[lcr| ]*\})?|\\(?!text|math)[a-zA-Z]+", " ", text)
    text = re.sub(r"\b(knight|knave)s\b", r"\1", rewritten(text, TYPE).lower())
    said = [word for word in re.findall(r"[^\W\d_]+", text) if word not in FILLING]
    ahead = said[:1] in (["knight"], ["knave"])
    found, role, before = set(), "", ""
    for word in said if ahead else said[::-1]:
        if word not in ROLES or (before in ROLES and not ahead):  # two roles of one name
            found.add((word, role))
        else:
            role = word
        before = word
    return found


def knights_right(gold: str, boxes: list[str]) -> bool:
    """Whether the boxes give every name of a gold its role, knight or knave, and no other."""
    return bool(roles(gold)) and roles(gold) == set().union(*map(roles, boxes))


def words_right(gold: str, boxes: list[str]) -> bool:
    """Whether each box, or all together, has the words of a gold, in any case, font and order."""
    if IS_ROLE.search(gold):
        return knights_right(gold, boxes)
    texts = [rewritten(text, TYPE).casefold() for text in (gold, ", ".join(boxes), *boxes)]
    wanted, together, *each = (sorted(re.split(r"['’ -]+", part) for part in parts(text)) for text in texts)
    return bool(wanted) and (together == wanted or each == [wanted] * max(1, len(boxes)))


# Comparing ----------------------------------------------------------------------------------------
def close(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two values are equal, where one holds a decimal to a relative 1e-6."""
    decimal = a.has(sympy.Float) or b.has(sympy.Float)
    a, b = (x.xreplace({f: sympy.Rational(str(f)) for f in x.atoms(sympy.Float)}).doit() for x in (a, b))
    exact = a.free_symbols or b.free_symbols or (a.is_Rational and b.is_Rational and not decimal)
    if a == b or exact:
        return a == b
    gap, size = abs(a - b).evalf(50), max(abs(a).evalf(50), abs(b).evalf(50))
    return bool(gap <= size * (1.000001e-6 if decimal else 1e-25) < sympy.oo)  # 0.333333 is 1/3


def equal_values(a: sympy.Basic, b: sympy.Basic, *rounding: int) -> bool:
    """In place of math-verify's: it rounds to 6 decimals. 28 % is 28 and 0.28."""
    if isinstance(a, (sympy.MatrixBase, sympy.MatrixExpr)):
        return VALUES(a, b, *rounding)
    bare_a, bare_b = grader.get_pct_val(a, a), grader.get_pct_val(b, b)
    return close(a, b) or ((bare_a is a) != (bare_b is b) and close(bare_a, bare_b))  # one of them is per cent


def equal_part(gold: str, said: str) -> bool:
    """Whether a part of an answer is that of the gold."""
    if is_words(gold):
        return words_right(gold, [said])
    if re.fullmatch(r"\(?[A-J]\)?", gold) and (choice := CHOICE.fullmatch(said)):
        return choice[1] == gold.strip("()")
    based = [BASED.fullmatch(text) for text in (gold, said)]
    if all(based):
        return len({(number[1].lstrip("0").upper(), number[2]) for number in based}) == 1
    gold, said = (number[1] if number else text for number, text in zip(based, (gold, said), strict=True))
    gold = latex(gold, False)
    said = latex(said, not has_variable(gold))
    if LOST.search(gold) or LOST.search(said):
        sides = [re.fullmatch(r"(?:(.*[^<>!:])=)?(.*)", rewritten(text, BARE)).groups() for text in (gold, said)]
        names, values = zip(*sides, strict=True)
        if any(map(LOST.search, values)):
            return sides[0] == sides[1]
        return len({*names} - {None}) < 2 and equal_part(*values)
    with mock.patch.multiple(grader, sympy_numeric_eq=equal_values, solve=solve):
        return bool(grader.verify(read(gold), read(said), timeout_seconds=None))


def equal(gold: str, said: str) -> bool:
    """Whether an answer is the gold; of two lists each part must have its own, in any order."""
    if max(len(gold), len(said)) > LONGEST:
        return False
    if is_words(gold):
        return words_right(gold, [said])
    gold, said = rewritten(gold, TYPE), rewritten(said, TYPE)
    wanted, left = parts(gold), parts(said)
    # One part may be the set of the others' parts, which holds nothing twice.
    if min(len(wanted), len(left)) < 2 and len(set(wanted)) == len(wanted):
        return equal_part(gold, said)
    for part in wanted:
        match = next((other for other in left if part == other or equal_part(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return not left
