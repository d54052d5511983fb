r"""What counts as right: gold, answer, verdict and why; the agreement with recorded verdicts.

python tests/verdicts.py                        the table of tests/README.md
python tests/verdicts.py FOLDER                 agreement with verifier_cases.jsonl and
                                                verifier_rollouts.jsonl.gz of a folder, by kind
"""

import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.verifier import boxed, verify

KNIGHTS = "(1) Michael is a knight\n(2) Evelyn is a knave\n(3) Zoey is a knight"
RIGHT_AND_WRONG = {  # why: [(gold, right answers, wrong answers)]
    "e-notation is a number, in decimals equal to a relative 1e-6": [
        ("3e8", [r"3 \times 10^8", "300000000", "3E+8", r"3\cdot10^{8}", "3 x 10^8", "3.0e8"], ["3e7", "3", "24.46"]),
        ("4.5e33", [r"4.5 \times 10^{33}", "4.5*10**33", "45e32"], ["4.5e32", "4.5", r"4.5 \times 10^{32}"]),
        ("1e-07", [r"10^{-7}", "0.0000001", r"1 \times 10^{-7}", "1E-7"], ["2e-7", "0", "0.0000002", "1e-8"]),
        ("1e+21", ["10^{21}", "1000e18"], ["10^{20}", "1e-21"]),
        ("6.022e23", [r"6.022\times10^{23}", "6.0220001e23"], ["6.023e23"]),
        ("3e4", ["30000"], ["2e6"]),
        ("-0.281718", [], ["1e-3"]),
        ("1e-3", ["0.001", r"\frac{1}{1000}"], ["-0.281718", "1e-4"]),
        ("2e", [r"2e", "e*2"], ["2e0", "2"]),
    ],
    "exact values are equal exactly, decimals to a relative 1e-6": [
        ("10^{-20}", ["1e-20", r"\frac{1}{10^{20}}"], ["10^{-25}", "0"]),
        (r"\frac{1}{2^{80}}", ["2^{-80}"], [r"\frac{1}{2^{79}}"]),
        ("0.0000001", ["1e-7"], ["0.0000002", "0"]),
        ("0.000001", [], ["0.0000014"]),
        (r"6.63\times10^{-34}", ["6.63e-34"], [r"1.05\times10^{-34}", "6.64e-34"]),
        (r"\frac{2^{2005}+1}{3\cdot2^{2006}}", [], [r"\frac{1}{3\cdot2^{2006}}"]),
        (r"\{10^{-20}, 1\}", [r"1, 10^{-20}"], [r"\{10^{-25}, 1\}"]),
        ("(10^{-20},1)", [], ["(10^{-25},1)"]),
        (r"\begin{pmatrix}10^{-20}\\1\end{pmatrix}", [], [r"\begin{pmatrix}10^{-25}\\1\end{pmatrix}"]),
        ("1/3", ["0.333333", "0.33333333", r"\frac{2}{6}"], ["0.3333", "0.33"]),
        (r"\sqrt{17}", ["4.123105625617661", "4.123106"], ["4.1231"]),
        (r"\pi", ["3.14159265", "π"], ["3.14", r"\frac{22}{7}", r"\frac{355}{113}"]),
        ("1000000", ["1,000,000", "1e6"], ["1000001", "999999"]),
        ("5.0", ["5", "5.00"], ["5.1"]),
        (r"28\%", ["28", "0.28", "28 percent", "28%", r"\frac{28}{100}"], ["0.2801", r"2800\%", "2.8"]),
    ],
    "a mixed number is a sum": [
        ("5 1/2", [r"\frac{11}{2}", "5.5", r"5\frac12", "11/2", "5½"], ["3", "5/2", "51/2"]),
        (r"\frac{9}{4}", ["2 1/4", r"2\frac{1}{4}", "2¼"], ["3/4", "2 1/3"]),
        ("3/4", [], ["2 1/4"]),
        ("-2 1/4", ["-9/4", "-2.25"], ["-7/4", "9/4"]),
        ("31/2", ["15.5"], ["3 1/2"]),
        ("3", [], ["1 2", "2 2/2", "5 1/2"]),
    ],
    "blanks and thin spaces between thousands": [
        ("1000000", [r"1\,000\,000", "1 000 000", "1{,}000{,}000", "1~000~000", "1\u202f000\u202f000"], ["1 000"]),
        ("1000", ["1 000", "1,000", r"\$1,000"], ["1, 000", "1 0 0 0"]),
        ("12500", [r"12\;500"], ["12", "500"]),
    ],
    "Unicode": [
        ("9", ["3²", "９", "√81"], ["32", "3³"]),
        (r"2\sqrt{3}", ["2√3", "2√(3)", "2*sqrt(3)", "2 sqrt(3)", "√12"], ["2√2", "23", "6"]),
        (r"90^\circ", ["90°", "90", "90 degrees", r"90^{\circ}"], ["9°", "91°"]),
        (r"\frac12", ["½", "0.5", "1⁄2"], ["¼", "12"]),
        (r"\infty", ["∞", "infinity", r"+\infty", "inf"], [r"-\infty", "-∞", "8"]),
        ("42", ["４２", "42．"], ["24"]),
        ("-5", ["−5", "–5"], ["5"]),
        ("6", ["2×3", "2·3", "12÷2"], ["23"]),
        (r"x \le 5", ["x ≤ 5", "x <= 5"], ["x ≥ 5", "x < 5"]),
        (r"x \ne 5", ["x ≠ 5"], ["x = 5"]),
        (r"1 \pm \sqrt{2}", ["1 ± √2"], ["1 + √2"]),
        (r"[0,1) \cup (2,3]", ["[0,1) ∪ (2,3]"], ["[0,1] ∪ (2,3]"]),
        (r"\sqrt[3]{2}", ["∛2", "2^{1/3}"], ["√2"]),
        ("x_1", ["x₁"], ["x₂"]),
        ("x^{10}", ["x¹⁰"], ["x^{1}0", "10x"]),
    ],
    "operators and functions as Python and keyboards write them": [
        (r"\frac{\pi}{2}", ["pi/2", "π/2", "0.5*pi"], ["pi", "1/2", "p/2"]),
        (r"-2\pi", ["-2*pi", "-2pi"], ["2*pi"]),
        (r"\ln 2", ["ln(2)", r"\ln(2)", "ln 2"], ["ln(3)", "2"]),
        ("x^2+1", ["x**2+1", "1 + x**2", "x^2 + 1"], ["x*2+1", "x**3+1"]),
        ("1024", ["2**10", "2^10", "2^{10}"], ["2*10", "20"]),
        (r"\sin x", ["sin(x)", "sin x"], ["cos(x)", "x"]),
        (r"4\sqrt{2}", [r"4\sqrt(2)", "4sqrt(2)"], ["4"]),
        (r"\frac{1}{n+1}", ["1/(n+1)"], ["1/n+1"]),
        ("2x", ["x*2", "x+x"], ["2", "x", "3x"]),
    ],
    "an upright constant is the constant": [
        ("e", [r"\mathrm{e}", r"\text{e}"], ["f", "2"]),
        ("3+4i", [r"3+4\mathrm{i}"], ["3-4i", "7"]),
        (r"\mathrm{e}^2", ["e^2", "e**2"], ["2e"]),
    ],
    "a unit behind a number says what it counts": [
        ("60", ["60 km/h", r"60\text{ km/h}", "60 mph", "60 miles per hour", "60kmh"], ["6 km/h", "61 km/h"]),
        ("150", ["150 cm^2", r"150\,\mathrm{cm}^{2}", "150cm²", "150 square centimeters"], ["15 cm^2", "150^2"]),
        ("12", [r"\text{12 apples}", "12 apples", "12 oranges", r"12\text{ red balls}"], ["13 apples", "12/5"]),
        ("42", ["42元", "42 个", "42 years old"], ["4元"]),
        ("9.8", [r"9.8~\text{m/s}^2", "9.8 m/s^2", r"9.8\ \mathrm{m\,s^{-2}}", "9.8m/s"], ["9.7 m/s^2"]),
        ("5", ["5 m", "5m", "5g", "5 kg", r"5\,\mathrm{m}", "5th", r"5^{\text{th}}"], ["5x", "5t", "5ab", "5 xy"]),
        ("5m", ["5m", "m*5"], ["5", "5n", "6m"]),
        ("5 km", ["5", r"5\text{ km}"], ["6 km"]),
        ("2", [], ["2x", "2 pi", "2 thirds", "2 halves", "2 squared", "2 dozen", "2 million", "2 mod 3"]),
        ("2000000", ["2 million", r"2\text{ million}", "2 million dollars"], ["2", "2 billion"]),
        (r"\frac{3}{2}", [r"\frac{3}{2} cm", r"1.5\text{ hours}"], [r"\frac{3}{2} x"]),
        (r"25", ["25°C", r"25^\circ\text{C}", "25 ℃"], ["2.5°C"]),
        ("x", ["x"], ["x dollars 5", "y"]),
        ("3xy", ["3yx"], ["3", "3x"]),
    ],
    "a currency says what it counts": [
        (
            "18",
            ["18 dollars", "18 USD", "€18", "£18", "18€", r"\$18.00", "US$18", "USD 18", "₹18", "¥18"],
            ["€81", "$1.8"],
        ),
        (r"\$18", ["18", "$18$", "18 dollars"], ["19"]),
        ("-5", ["-$5", r"-\$5"], ["$5"]),
        ("1200", ["$1,200", r"\$1{,}200", "1200.00 dollars"], ["$1.2"]),
    ],
    "a dot that ends the sentence": [
        ("5", ["5.", "5 .", r"5\text{.}"], ["5.1", ".5"]),
        ("0.5", [".5", "0.5."], ["5."]),
    ],
    "a word that changes the meaning": [
        (
            "2",
            ["about 2"],
            ["2 or more", r"2 \text{ or more}", "at least 2", "more than 2", "2 or 3", "not 2", "2 if x>0"],
        ),
        (r"2 \text{ or more}", ["2 or more"], ["2", r"2 \text{ or less}"]),
        ("f(x)=0", ["f(x) = 0", r"f(x)=0 \text{ for all } x"], [r"\forall x>0, f(x)=0", "f(x)=0 for x>0", "f(x)=1"]),
        ("at least 2", ["at least 2"], ["at most 2", "2"]),
        ("5", [], ["5 to 6", "between 4 and 6", "5 or 6", "5 and 6", "5, 6", "-5 or 5", r"\pm 5"]),
    ],
    "the base belongs to the number": [
        ("123_5", ["123_5", "123_{5}", "123", "(123)_5"], ["123_6", "124_5", "124"]),
        ("1A_{16}", ["1a_{16}"], ["A1_{16}", "1A_{17}"]),
        ("101_2", [], ["101_3", "110_2"]),
    ],
    "a list has each element as often as the gold, in any order": [
        ("1,2,2", ["2,1,2", r"1, 2 \text{ and } 2"], ["1,1,2", "1,2", "1,2,3", "(1,2)"]),
        ("1, -2", [r"a=1 \text{ or } a=-2", r"\{-2, 1\}", "-2; 1"], ["1", "-2", "1, 2"]),
        ("{1,2}", ["2,1", r"\{2, 1\}"], ["1", "1,3"]),
        ("1,2", ["2,1", r"\{1,2\}"], ["1,1", "1,2,3", "1,2,2", "12"]),
        ("n=2,4,6", ["2,4,6", "6,4,2"], ["n=3,5,7"]),
        (r"\pm 2021", [r"-2021, 2021"], ["2021"]),
        ("x=1, y=2", ["x=1,y=2", "y=2, x=1"], ["x=2, y=1", "x=1"]),
        ("(1,2), (3,4)", ["(3,4), (1,2)"], ["(2,1), (3,4)", "(1,2)"]),
        ("(1,2)", ["(1, 2)"], ["(2,1)", "[1,2]", "1"]),
        (r"1,2,\ldots,n", [], [r"1,3,5,\ldots,2n-1"]),
        ("4, 5", ["5,4", "4 and 5"], ["4", "5", "45", "9"]),
        ("7:32", [r"\frac{7}{32}", "7:32"], ["32:7"]),
    ],
    "words are compared as words": [
        (
            "Paris",
            ["paris", r"\text{Paris}", "PARIS.", r"\mathbf{Paris}", "**Paris**"],
            ["sirap", "Pairs", "Rome", "P"],
        ),
        ("no", ["No", r"\text{no}", "NO."], ["on", "yes", "not", "n", "o"]),
        ("Yes", ["yes", r"\textbf{Yes}", "$\\text{yes}$"], ["no", "sey", "yes and no"]),
        ("New York", ["new york", r"\text{New}\ \text{York}", "New  York"], ["York New", "New", "newyork city"]),
        ("True", ["true"], ["false", "eurt"]),
        ("odd", ["Odd"], ["even", "dod", "oddd"]),
        ("twenty-one", ["Twenty-one", "twenty one"], ["twenty", "one"]),
        ("red and blue", ["blue, red", r"\text{red and blue}"], ["red", "der and blue", "red or green"]),
        ("Zürich", ["zürich"], ["Zurihc"]),
        ("abc", ["abc", "a b c", "cba", "a*b*c"], ["abd", "ab"]),
        ("xy", ["yx", r"x \cdot y", "x*y"], ["x", "x+y"]),
    ],
    "a choice is its letter, with or without its text": [
        (
            "E",
            [
                "E: a polygenic score",
                "E) 12",
                r"\textbf{(E) }12",
                r"\text{E: 12}",
                "E.",
                "(E)",
                r"\text{E}",
                "Option E",
            ],
            [],
        ),
        ("E", [], ["A", "(A)", "A) E", "E or A", "E, A", "E) 1 A) 2", "A: E", "(A) and (E)", "12"]),
        ("(B)", ["B", "B.", "(B)", r"\mathrm{(B)}", "B) 7"], ["C", "(C) B", "8"]),
        ("AC", ["AC"], ["CA", "A", "AB"]),
        ("A", ["A. The cat"], ["Apple", "B. A cat"]),
    ],
    "Knights and Knaves: every name with its role": [
        (
            KNIGHTS,
            [
                KNIGHTS,
                "Michael is a knight, Evelyn is a knave, Zoey is a knight",
                r"\text{Zoey is a knight, Michael is a knight, and Evelyn is a knave.}",
                "Michael: knight, Evelyn: knave, Zoey: knight",
                "Michael = knight; Evelyn = Knave; Zoey = Knight",
                "Knights: Michael, Zoey; Knaves: Evelyn",
                r"\text{Knaves: Evelyn} \\ \text{Knights: Zoey and Michael}",
                "Michael and Zoey are knights, Evelyn is a knave",
                r"\begin{array}{ll} Michael & \text{knight} \\ Evelyn & \text{knave} \\ Zoey & knight\end{array}",
                r"\text{(1) Michael is a knight}\\\text{(2) Evelyn is a knave}\\\text{(3) Zoey is a knight}",
                "michael (knight), evelyn (knave), zoey (knight)",
            ],
            [
                "Michael is a knave, Evelyn is a knave, Zoey is a knight",
                "Michael is a knight, Evelyn is a knave",
                "Michael is a knight, Michael is a knave, Evelyn is a knave, Zoey is a knight",
                "Michael is not a knight, Evelyn is a knave, Zoey is a knight",
                "Michael is a knight or a knave, Evelyn is a knave, Zoey is a knight",
                "Michael is a knight, Evelyn is a knave, Zoey is a knight, Bob is a knave",
                "knight, knave, knight",
                "Knights: Michael, Zoey, Evelyn; Knaves: Evelyn",
                "Michael, Evelyn, Zoey",
            ],
        ),
        (
            "Ann is a knave and Bo is a knight",
            ["Bo is a knight, Ann is a knave"],
            ["Ann is a knight and Bo is a knave"],
        ),
    ],
    "a number before a bracket is a factor": [
        ("6", ["2(3)", "(2)(3)", r"2\left(3\right)", "(2)3", r"2 \cdot 3"], ["5", "23"]),
        ("5", [], ["2(3)", "(2)(3)", "2 (3)"]),
        (r"\frac{2}{3}", ["2(1/3)", r"2(\frac{1}{3})"], [r"2\frac{1}{3}"]),
        ("12", [r"2\binom{4}{2}", "3(4)", "(3)(2)(2)"], [r"\binom{4}{2}"]),
        ("3", [r"\log_2(8)", r"\log_{2}(8)"], []),
    ],
    "what the parser drops is compared as it is written": [
        ("f'(x)=0", ["f'(x) = 0"], ["f(x)=0", "f''(x)=0", "f'(x)=1"]),
        ("x'", ["x'"], ["x", "x''"]),
        ("y'=2x", ["y' = 2x", "2x"], ["y=2x", "y'=3x"]),
        (r"\frac{dy}{dx}=x", [r"\frac{dy}{dx} = x", "x"], [r"\frac{dy}{dx}=2x", "y=x"]),
        ("12_{5}+1", ["12_5+1"], ["13", "12_6+1"]),
        ("13", [], ["12_5+1"]),
        ("7", ["111_2 = 7", "7"], ["111_2 = 8"]),
        ("A^T", ["A^{T}"], ["A"]),
        (r"(1,\ldots,n)", [r"(1,\dots,n)", "(1, ..., n)"], ["(1,n)", r"(1,\ldots,2n)"]),
        ("2.75", [], ["5.5.5"]),
        (r"15\%", [], [r"5 \% 3", r"5\% of 3"]),
        ("0", ["0"], ["0x1F", "0 if x > 0"]),
        ("1/6", [], ["1:2:3"]),
        ("1:2:3", ["1:2:3", "1 : 2 : 3"], ["1/6", "3:2:1"]),
    ],
    "a call that is no LaTeX is compared as it is written": [
        ("Eq(x**2/4 + y**2/3, 1)", ["Eq(x**2/4+y**2/3, 1)"], ["Eq(x**2/16 + y**2/12, 1)", "1", "x^2/4+y^2/3"]),
        ("Eq(x, 5)", ["Eq(x,5)"], ["Eq(x, 6)", "5", "qE(x,5)"]),
        ("Interval(0, 1)", ["Interval(0,1)"], ["Interval(0, 2)", "Interval(1, 0)", "(0,1)"]),
        ("re(5)", ["re(5)"], ["5re", "er(5)"]),
        ("max(1,2)", ["max(1, 2)"], ["max(2,3)", "xam(1,2)"]),
        ("5", ["dist(A,B) = 5"], ["dist(A,B) = 6", "Eq(x, 5)", "Rational(5, 1)"]),
    ],
    "equations are equal for what they say, not for having no solution": [
        ("x^2=-1", ["x^2+1=0", "-1=x^2"], ["x^2=-4", "x^2=1"]),
        (r"\sin x=2", [], [r"\sin x=3"]),
        ("x^2+y^2=1", ["y^2+x^2=1", "x^2+y^2-1=0"], ["x^2+y^2=4", "x^2+y^2=-1"]),
        (r"\frac{x^2}{4}+\frac{y^2}{3}=1", [], [r"\frac{x^2}{16}+\frac{y^2}{12}=1"]),
        ("x^2<-1", [], ["x^2<-2"]),
        ("5", ["x=5", "m+n=5", "2+3=5"], ["2+2=5", "3=5", "1 = 2 ? = 5"]),
        ("3.33", ["10/3 = 3.33"], ["11/3 = 3.33"]),
    ],
    "no part of an answer is the answer": [
        (
            r"\frac{1}{2}",
            [],
            [r"5 + \frac{1}{2}\ ".strip(), r"answer: \frac{1}{2} + 5", r"7 \boxed{{{{\frac{1}{2}}}}}"],
        ),
        (
            "5",
            [],
            [r"\text{if } x=5", r"\text{not } x = 5", r"x=1 \mid y=5", r"x \equiv 3 ? = 4 = 5", r"7 \boxed{{{{5}}}}"],
        ),
    ],
    "nothing that cannot be read is right": [
        (r"\begin{cases} 1 & x \\ 2\end{cases}", [], ["2", "1"]),
        ("5", ["x=5", r"\boxed{5}", r"\left(5\right)"], ["5 @", "?5", "the 5 cats of 6", "5 cats and 6 dogs", "so 5"]),
    ],
}


def pairs() -> list[tuple[str, str, int]]:
    """(gold, answer, verdict) of the table."""
    rows = [row for found in RIGHT_AND_WRONG.values() for row in found]
    return [
        (gold, said, verdict)
        for gold, *both in rows
        for verdict, found in ((1, both[0]), (0, both[1]))
        for said in found
    ]


def cell(text: str) -> str:
    """A text as code in a cell of a Markdown table."""
    return "`" + text.replace("|", "\\|").replace("\n", "⏎") + "`"


def print_table() -> None:
    """A line per gold and verdict, with all its answers."""
    print("| gold | answer | verdict | why |\n|---|---|---|---|")
    for why, rows in RIGHT_AND_WRONG.items():
        for gold, right, wrong in rows:
            for said, verdict in ((right, "right"), (wrong, "wrong")):
                if said:
                    print(f"| {cell(gold)} | {', '.join(map(cell, said))} | {verdict} | {why} |")


def as_asked(row: dict) -> tuple[str, str]:
    """(gold, text) of a recorded case, where answers that are bare or behind `A:` get a box."""
    gold, text = row["gold"], row["pred"]
    if row["kind"] == "answer_pair":
        text = f"\\boxed{{{text}}}"
    elif row["suite"].startswith("gsm8k"):
        text = re.sub(r"A: (.*)\s*$", r"\\boxed{\1}", text)
    elif row["kind"] == "extract_both":  # both are prose: the last formula is the answer
        inside = [boxed(side) or re.findall(r"\$+([^$]+)\$+", side)[-1:] for side in (gold, text)]
        gold = ", ".join(inside[0]) or gold
        text = text if boxed(text) else f"\\boxed{{{(inside[1] or [text])[0]}}}"
    return gold, text


def print_agreement(folder: Path) -> None:
    """Rows, wrongly right, wrongly wrong of each kind, and every disagreement."""
    rows = [*map(json.loads, (folder / "verifier_cases.jsonl").read_text().splitlines())]
    rows += map(json.loads, gzip.decompress((folder / "verifier_rollouts.jsonl.gz").read_bytes()).splitlines())
    rows = [row for row in rows if not row["contested"] and row["expected"] is not None]
    asked = [as_asked(row) for row in rows]
    scores, errors = verify([text for _, text in asked], [gold for gold, _ in asked])
    count, wrong = Counter(), []
    for row, (gold, text), score in zip(rows, asked, scores, strict=True):
        kind = f"{row['kind']} {row['suite'] if row['id'].startswith('vr') else ''}".strip()
        count[kind] += 1
        if (score == 1) != row["expected"]:
            sign = "right" if score == 1 else "wrong"
            count[kind, sign] += 1
            wrong.append(f"{row['id']} called {sign}: {gold[-60:]!r} against {text[-80:]!r}")
    print(*wrong, sep="\n")
    print("| kind | rows | wrongly right | wrongly wrong |\n|---|---|---|---|")
    for kind in [kind for kind in count if isinstance(kind, str)]:
        print(f"| {kind} | {count[kind]} | {count[kind, 'right']} | {count[kind, 'wrong']} |")
    print(f"errors: {errors}")


if __name__ == "__main__":
    print_agreement(Path(sys.argv[1])) if sys.argv[1:] else print_table()
