"""Writes recipes/reactions: reactions in SMILES, the text that chemistry's encoders are converted and judged on.

    python docs/reactions.py [--out recipes/reactions]

Reactions are put together from building blocks by nine textbook reactions, solvents and reagents included. The groups
that are joined in the held-out file are none of the other's; solvents and reagents are the same. Every reaction has
TOKENS tokens, so that a file that is read as one text falls apart into whole reactions.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

TOKENS = 94  # with [CLS] and [SEP] 96
SIZES = {"calibration": 1024, "heldout": 256}
TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|[A-Za-z]|[^A-Za-z\s]")


def blocks(text: str) -> list[str]:
    """One by one."""
    return text.split()


# What hangs on a functional group: SMILES whose first atom is the one that is bound, ring numbers from 1.
ARYLS = blocks("""
c1ccccc1 c1ccc(C)cc1 c1ccc(OC)cc1 c1ccc(F)cc1 c1ccc(Cl)cc1 c1ccc(C#N)cc1 c1ccc(C(F)(F)F)cc1 c1cccc(OC)c1 c1cccc(F)c1
c1cccc(Cl)c1 c1ccccc1C c1ccccc1OC c1ccccc1F c1cccnc1 c1ccncc1 c1ccccn1 c1cncnc1 c1ccsc1 c1cccs1 c1ccco1 c1cccc2ccccc12
c1ccc2ccccc2c1 c1ccc2[nH]ccc2c1 c1cnn(C)c1 c1ccc(N(C)C)cc1 c1ccc(C(=O)OC)cc1 c1cc(F)cc(F)c1 c1cc(OC)cc(OC)c1
c1ccc2c(c1)OCO2 c1ccc(S(C)(=O)=O)cc1 c1ccc([N+](=O)[O-])cc1 c1cccc(C(F)(F)F)c1 c1ccc(OC(F)(F)F)cc1 c1ccc(-c2ccccc2)cc1
c1ccc(C(C)(C)C)cc1 c1cc(C)on1 c1csc(C)n1 c1ccc(OCc2ccccc2)cc1 c1ccc(C(C)=O)cc1 c1cnc2ccccc2c1 c1ccc2ncccc2c1
""")
ALKYLS = blocks("""
CC CCC CCCC CC(C)C CCC(C)C CCOC CCc1ccccc1 Cc1ccccc1 Cc1ccc(F)cc1 Cc1ccc(OC)cc1 Cc1ccccn1 Cc1cccnc1 CC1CC1 CC1CCCCC1
CCCCCC CCN1CCOCC1 CCCC(=O)OC CC(=O)OCC CCC#N CCCCCl CC(F)(F)F CCSC CCC(=O)OC CCCN(C)C Cc1ccc(Cl)cc1 Cc1ccc(C#N)cc1
""")
AMINES = blocks("""
NCc1ccccc1 NCCc1ccccc1 NC1CCCCC1 NC1CC1 N(C)C N(CC)CC N1CCOCC1 N1CCCCC1 N1CCCC1 N1CCN(C)CC1 NCCOC NCCCN1CCOCC1 NC(C)C
NCC(=O)OC Nc1ccccc1 Nc1ccc(F)cc1 Nc1cccnc1 NCc1ccco1 N(C)Cc1ccccc1 N1CCC(O)CC1 N1CCN(C(=O)OC(C)(C)C)CC1 NCC(C)C
NCC1CC1 N1CCC(C(=O)OCC)CC1 Nc1ccc(OC)cc1 NCCN(C)C N1CCc2ccccc2C1 NC(Cc1ccccc1)C(=O)OC N1CC(F)(F)C1 NOC Nc1nccs1
NCc1ccncc1
""")
SOLVENTS = blocks("""
ClCCl C1CCOC1 CN(C)C=O CO CCO CC#N O CS(C)=O C1COCCO1 Cc1ccccc1 CCOC(C)=O CCOCC COCCOC ClC(Cl)Cl CC(C)O CN1CCCC1=O
CC(C)=O
""")
BASES = blocks("""
CCN(CC)CC CCN(C(C)C)C(C)C O=C([O-])[O-].[K+].[K+] O=C([O-])[O-].[Na+].[Na+] O=C([O-])[O-].[Cs+].[Cs+] [H-].[Na+]
[Na+].[OH-] c1ccncc1 CC(C)(C)[O-].[K+] O=C([O-])O.[Na+] C1CCC2=NCCCN2CC1 CN1CCOCC1 O=P([O-])([O-])[O-].[K+].[K+].[K+]
""")
COUPLINGS = blocks("""
CCN=C=NCCCN(C)C.Cl On1nnc2ccccc21 C(=NC1CCCCC1)=NC1CCCCC1 CN(C)C(On1nnc2cccnc21)=[N+](C)C.F[P-](F)(F)(F)(F)F
""")
PALLADIUM = blocks("""
c1ccc([P](c2ccccc2)(c2ccccc2)[Pd])cc1 CC(=O)[O-].CC(=O)[O-].[Pd+2] Cl[Pd]Cl [Pd]
""")


class Blocks:
    """Building blocks of one file, and the draws from them: every fourth aryl, alkyl and amine is held out."""

    def __init__(self, name: str) -> None:
        held = name == "heldout"
        self.draw = random.Random(f"reactions/{name}")

        def own(kind: Sequence[str]) -> list[str]:
            return [one for n, one in enumerate(kind) if (n % 4 == 3) is held]

        self.aryls, self.alkyls, self.amines = own(ARYLS), own(ALKYLS), own(AMINES)

    def some(self, kind: Sequence[str], least: int = 1, most: int = 2) -> list[str]:
        """Different ones, as many as drawn."""
        return self.draw.sample(list(kind), self.draw.randint(least, min(most, len(kind))))

    def one(self, kind: Sequence[str]) -> str:
        return self.draw.choice(list(kind))


def bound(ring: str, other: str) -> str:
    """A ring with another group on its first atom; the ring numbers of the group are those after 1, which is open."""
    pieces = re.split(r"(\[[^\]]+\])", other)  # digits in brackets count hydrogens and charges
    inner = "".join(p if p.startswith("[") else re.sub(r"\d", lambda n: str(int(n[0]) + 1), p) for p in pieces)
    return f"{ring[:2]}({inner}){ring[2:]}"


def amide(b: Blocks) -> tuple[list[str], str]:
    acid, amine = b.one(b.aryls), b.one(b.amines)
    return [f"O=C(O){acid}", amine, *b.some(COUPLINGS, 1, 2), *b.some(BASES, 0, 1)], f"O=C({amine}){acid}"


def acylation(b: Blocks) -> tuple[list[str], str]:
    acid, amine = b.one(b.aryls), b.one(b.amines)
    return [f"O=C(Cl){acid}", amine, *b.some(BASES, 1, 1)], f"O=C({amine}){acid}"


def esterification(b: Blocks) -> tuple[list[str], str]:
    acid, alkyl = b.one(b.aryls), b.one(b.alkyls)
    return [f"O=C(O){acid}", f"O{alkyl}", "O=S(=O)(O)O"], f"O=C(O{alkyl}){acid}"


def hydrolysis(b: Blocks) -> tuple[list[str], str]:
    acid, alkyl = b.one(b.aryls), b.one(b.alkyls)
    return [f"O=C(O{alkyl}){acid}", b.one(["[Li+].[OH-]", "[Na+].[OH-]", "[K+].[OH-]"])], f"O=C(O){acid}"


def suzuki(b: Blocks) -> tuple[list[str], str]:
    one, two = b.one(b.aryls), b.one(b.aryls)
    used = [f"OB(O){one}", f"{b.one(['Br', 'I'])}{two}", *b.some(PALLADIUM, 1, 1), *b.some(BASES, 1, 1)]
    return used, bound(one, f"-{two}")


def williamson(b: Blocks) -> tuple[list[str], str]:
    aryl, alkyl = b.one(b.aryls), b.one(b.alkyls)
    used = [f"O{aryl}", f"{b.one(['Br', 'I', 'Cl'])}{alkyl}", *b.some(BASES, 1, 1)]
    return used, bound(aryl, f"O{alkyl}")


def sulfonamide(b: Blocks) -> tuple[list[str], str]:
    aryl, amine = b.one(b.aryls), b.one(b.amines)
    return [f"O=S(=O)(Cl){aryl}", amine, *b.some(BASES, 1, 1)], f"O=S(=O)({amine}){aryl}"


def reductive_amination(b: Blocks) -> tuple[list[str], str]:
    aryl, amine = b.one(b.aryls), b.one(b.amines)
    hydride = b.one(["[BH4-].[Na+]", "CC(=O)O[BH-](OC(C)=O)OC(C)=O.[Na+]", "[BH3-]C#N.[Na+]"])
    return [f"O=C{aryl}", amine, hydride, *b.some(["CC(=O)O"], 0, 1)], f"C({amine}){aryl}"


def buchwald(b: Blocks) -> tuple[list[str], str]:
    aryl, amine = b.one(b.aryls), b.one(b.amines)
    used = [f"{b.one(['Br', 'I'])}{aryl}", amine, *b.some(PALLADIUM, 1, 1), *b.some(BASES, 1, 1)]
    return used, bound(aryl, amine)


KINDS = (amide, acylation, esterification, hydrolysis, suzuki, williamson, sulfonamide, reductive_amination, buchwald)


def reactions(name: str, count: int) -> Iterator[str]:
    """Different reactions of TOKENS tokens each."""
    draws, seen = Blocks(name), set[str]()
    while len(seen) < count:
        used, product = draws.one(KINDS)(draws)  # type: ignore[operator]
        used += draws.some(SOLVENTS, 1, 3)
        draws.draw.shuffle(used)
        reaction = f"{'.'.join(used)}>>{product}"
        if len(TOKEN.findall(reaction)) == TOKENS and reaction not in seen:
            seen.add(reaction)
            yield reaction


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "recipes" / "reactions")
    given = parser.parse_args()
    for name, count in SIZES.items():
        (given.out / f"{name}.txt").write_text("".join(f"{one}\n" for one in reactions(name, count)))


if __name__ == "__main__":
    main()
