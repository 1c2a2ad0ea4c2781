"""Short texts that explain: countries, animals, jobs, tools, materials, words, and how everyday things come about."""

from __future__ import annotations

import random

from . import facts

PROCESSES = {
    "bread is made": (
        "Wheat is cut and its grains are ground into flour.",
        "The flour is mixed with water, salt and yeast.",
        "The dough rests in a warm place until it has grown to twice its size.",
        "It is shaped and baked in a hot oven.",
        "When it is brown, it is taken out to cool.",
    ),
    "rain forms": (
        "The sun warms the sea, and some of the water turns into vapor.",
        "The vapor rises, and high up the air is cold.",
        "There the vapor becomes tiny drops, which we see as clouds.",
        "The drops join until they are too heavy to float.",
        "Then they fall to the ground as rain.",
    ),
    "a seed becomes a tree": (
        "A seed falls on the ground and takes up water.",
        "Its shell opens and a root grows down.",
        "A thin stem pushes up toward the light.",
        "Leaves open and make food from light and air.",
        "Year after year the trunk grows thicker.",
    ),
    "a frog grows up": (
        "A frog lays its eggs in a pond.",
        "Out of each egg comes a tadpole, which breathes in water and has a tail.",
        "First its back legs grow, then its front legs.",
        "The tail becomes shorter and shorter.",
        "At last a young frog climbs out onto the land.",
    ),
    "a letter travels": (
        "Somebody writes a letter, puts it into an envelope and adds a stamp.",
        "The letter is dropped into a mailbox.",
        "A truck takes it to a building where letters are sorted.",
        "A train or a plane carries it to another town.",
        "In the morning it is brought to the door.",
    ),
    "paper is made": (
        "Trees are cut down and their bark is taken off.",
        "The wood is chopped and cooked until it is soft.",
        "The wet fibers are spread over a fine net.",
        "Heavy rollers press out the water.",
        "The dry sheet is cut to the right size.",
    ),
    "cheese is made": (
        "Milk is warmed in a large pot.",
        "Something sour is added, and the milk becomes thick.",
        "The solid part is cut, and the water runs out.",
        "It is pressed into a round shape and salted.",
        "Then it rests for weeks or months in a cool cellar.",
    ),
    "day becomes night": (
        "The earth is a ball that turns around once in twenty-four hours.",
        "One half of it always faces the sun.",
        "Where the sun shines, it is day.",
        "As the earth turns, each place moves into the shadow.",
        "There it is night until it has turned back into the light.",
    ),
    "honey is made": (
        "Bees fly from flower to flower and drink a sweet juice.",
        "They carry it back to the hive.",
        "There other bees take it and put it into small cells of wax.",
        "They fan it with their wings until it is thick.",
        "In the end they close each cell with more wax.",
    ),
    "a house is built": (
        "First the ground is made flat.",
        "A base of stone is laid, which carries everything else.",
        "Then the walls are put up, brick by brick.",
        "Beams are laid across, and the roof is set on top.",
        "Last come the windows and the doors.",
    ),
}
ORDER = (("First of all", "After that", "Then", "Next", "Finally"), ("To begin with", "Next", "After a while", "Then", "In the end"))
WHY = (
    "This takes time, but it is not hard to understand.",
    "People have known this for thousands of years.",
    "It happens every day, often without being noticed.",
    "Many people never think about it.",
    "Every step depends on the one before.",
    "If one step is left out, the rest does not work.",
)


def expository(rng: random.Random) -> str:
    """One text of about a hundred words."""
    kind = rng.choice((_process, _process, _countries, _animals, _animals, _people, _things, _words, _calendar, _groups))
    return kind(rng)


def _process(rng: random.Random) -> str:
    name = rng.choice(list(PROCESSES))
    steps = list(PROCESSES[name])
    if rng.random() < 0.5:
        keep = {0, *rng.sample(range(1, 5), 3)}
        steps = [s for i, s in enumerate(steps) if i in keep]
    if rng.random() < 0.4:
        steps = [f"{word}, {_lower(s)}" for word, s in zip(rng.choice(ORDER)[: len(steps)], steps, strict=True)]
    opening = rng.choice((f"How {name}", f"This is how {name}.", f"Have you ever wondered how {name}?", f"It takes {len(steps)} steps until {name}."))
    return opening + "\n" + " ".join([*steps, rng.choice(WHY)])


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _some(rng: random.Random, table: dict[str, str], count: int) -> list[tuple[str, str]]:
    return rng.sample(list(table.items()), count)


def _countries(rng: random.Random) -> str:
    lines = [
        rng.choice(
            (
                "{1} is the capital of {0}.",
                "The capital of {0} is {1}.",
                "{0} is a country, and its capital is {1}.",
                "Whoever visits {0} should also see {1}, its capital.",
            )
        ).format(*pair)
        for pair in _some(rng, facts.CAPITALS, rng.randint(3, 6))
    ]
    opening = rng.choice(
        (
            "Every country has a capital, the city where its government works.",
            "Some capitals are very old, and others are quite young.",
            "A capital is not always the largest city of a country.",
        )
    )
    return opening + " " + " ".join(lines)


def _animals(rng: random.Random) -> str:
    lines: list[str] = []
    for animal in rng.sample(sorted({*facts.YOUNG, *facts.SOUNDS, *facts.HOMES}), rng.randint(2, 4)):
        a = "An" if animal[0] in "aeiou" else "A"
        told = [
            f"{a} {animal} lives in a {facts.HOMES[animal]}." if animal in facts.HOMES else "",
            f"{a} {animal} {facts.SOUNDS[animal]}." if animal in facts.SOUNDS else "",
            rng.choice((f"A young {animal} is called a {facts.YOUNG[animal]}.", f"A {facts.YOUNG[animal]} grows up to be a {animal}."))
            if animal in facts.YOUNG
            else "",
        ]
        rng.shuffle(told)
        lines.append(" ".join(t for t in told if t))
    opening = rng.choice(
        (
            "Animals live in many places and make many sounds.",
            "There is much to say about animals.",
            "Each animal has its own way of life.",
            "Children like to learn about animals.",
        )
    )
    return opening + "\n" + "\n".join(lines)


def _people(rng: random.Random) -> str:
    lines = [
        rng.choice(("A {1} {0}.", "The one who {0} is called a {1}.", "If somebody {0}, we call this person a {1}.")).format(*pair)
        for pair in _some(rng, facts.JOBS, rng.randint(3, 6))
    ]
    opening = rng.choice(
        ("People do many kinds of work.", "In every town there are people with different jobs.", "A job is the work that a person does for others.")
    )
    return (
        opening
        + " "
        + " ".join(lines)
        + " "
        + rng.choice(("All of them are needed.", "Each of them has to learn for years.", "Nobody can do everything alone."))
    )


def _things(rng: random.Random) -> str:
    uses = [
        rng.choice(("To {0} you need a {1}.", "A {1} is used to {0}.", "People use a {1} to {0}.")).format(*pair).replace("a scissors", "scissors")
        for pair in _some(rng, facts.USES, rng.randint(2, 4))
    ]
    made = [
        rng.choice(("{1} is made from {0}.", "From {0} people make {1}.")).format(*pair) for pair in _some(rng, facts.MATERIALS, rng.randint(1, 3))
    ]
    lines = [*uses, *(m[0].upper() + m[1:] for m in made)]
    rng.shuffle(lines)
    opening = rng.choice(
        (
            "The things around us have their uses.",
            "Every tool was invented because somebody had a problem.",
            "Look around a house, and you will find many things.",
        )
    )
    return opening + " " + " ".join(lines)


def _words(rng: random.Random) -> str:
    opposite = [
        rng.choice(("The opposite of {0} is {1}.", "If something is not {0}, it may be {1}.", "{0} and {1} are opposites.")).format(*pair)
        for pair in _some(rng, facts.OPPOSITES, rng.randint(2, 4))
    ]
    past = [
        rng.choice(("The past tense of {0} is {1}.", "Today we {0}, yesterday we {1}.")).format(*pair)
        for pair in _some(rng, facts.PAST, rng.randint(2, 4))
    ]
    lines = [s[0].upper() + s[1:] for s in opposite + past]
    return rng.choice(("Words are related to each other.", "A language has rules, and it has exceptions.")) + " " + " ".join(lines)


def _calendar(rng: random.Random) -> str:
    names, word = rng.choice(((facts.DAYS, "day"), (facts.MONTHS, "month")))
    lines = [
        rng.choice(("{1} comes right after {0}.", "{0} comes right before {1}.", "After {0} comes {1}.")).format(
            names[i], names[(i + 1) % len(names)]
        )
        for i in rng.sample(range(len(names)), rng.randint(3, 5))
    ]
    opening = {"day": "A week has seven days.", "month": "A year has twelve months."}[word]
    return f"{opening} " + " ".join(lines)


def _groups(rng: random.Random) -> str:
    lines = []
    for name in rng.sample(list(facts.KINDS), rng.randint(2, 4)):
        a, b, c = rng.sample(facts.KINDS[name], 3)
        article = "an" if name[0] in "aeiou" else "a"
        lines.append(
            rng.choice(
                (
                    f"{a.capitalize()}, {b} and {c} are each {article} {name}.",
                    f"Examples of {article} {name} are {a}, {b} and {c}.",
                    f"If somebody says {a}, you think of {article} {name}, and {b} and {c} belong there too.",
                )
            )
        )
    return rng.choice(("We put things into groups so that we can talk about them.", "Many things belong together.")) + " " + " ".join(lines)
