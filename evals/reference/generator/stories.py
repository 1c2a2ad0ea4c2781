"""Short stories: two friends, a place, a season, a wish, a trouble, a way out and a close, each drawn from small tables of sentences."""

from __future__ import annotations

import random

GIRLS = [
    "Anna", "Mia", "Lucy", "Ella", "Zoe", "Nora", "Ruby", "Ivy", "Lily", "Rosa", "Mei", "Sara", "Lena", "Tina", "Clara", "Emma", "Gina",
    "Iris", "Kate", "Maya",
]
BOYS = [
    "Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Finn", "Omar", "Noah", "Adam", "Kofi", "Raj", "Hugo", "Paul", "Yusuf", "Dan", "Felix",
    "Henry", "John", "Liam",
]
PEOPLE = [
    "his/her grandmother", "his/her grandfather", "an old farmer", "a kind neighbor", "the baker", "the teacher", "a tall sailor",
    "the woman from the mill",
]
TRAITS = ["small", "brave", "curious", "quiet", "clever", "patient", "cheerful", "shy", "careful", "proud", "gentle", "restless"]
SEASONS = {
    "spring": (
        "The snow had melted and the first flowers were out.",
        "The birds were back and the air smelled of wet earth.",
        "Every tree had new leaves, and the streams were full.",
    ),
    "summer": (
        "The days were long and the grass was dry and warm.",
        "It was so hot that even the dogs lay in the shade.",
        "Bees hummed over the fields from morning to evening.",
    ),
    "autumn": (
        "The leaves had turned red and gold.",
        "A cold wind blew across the fields, and the nights grew longer.",
        "The apples were ripe, and smoke rose from every chimney.",
    ),
    "winter": (
        "Snow lay on all the roofs.",
        "The pond was frozen and the road was white.",
        "It was dark before supper, and the stars were very bright.",
    ),
}
PLACES = {
    "in a village by the sea": ("the harbor", "the beach", "the lighthouse"),
    "in a town at the foot of a mountain": ("the old bridge", "the market", "the forest"),
    "on a farm near a river": ("the barn", "the river bank", "the apple trees"),
    "in a small house in the woods": ("the clearing", "the stream", "the hollow oak"),
    "in a busy city": ("the park", "the station", "the library"),
    "on an island with one road": ("the cliffs", "the windmill", "the little shop"),
}
WISHES = {
    "find the lost dog": ("The dog had been gone since the morning.", "the dog", "the dog came running and barked with joy"),
    "build a boat": ("There were planks behind the shed, and nobody needed them.", "the boat", "the boat floated, and it hardly leaked at all"),
    "fly a kite": ("The kite was made of blue paper and thin sticks.", "the kite", "the kite rose higher than the tallest tree"),
    "bake a cake for the feast": (
        "There was flour in the jar and there were six eggs in the bowl.",
        "the cake",
        "the cake came out of the oven round and brown",
    ),
    "mend the broken clock": ("The clock had stopped at noon many years ago.", "the clock", "the clock began to tick again"),
    "plant a garden": ("There was a bag of seeds on the shelf.", "the garden", "the first green leaves came up in a straight line"),
    "catch a fish": ("The rod was old, but the line was strong.", "the fish", "a silver fish hung on the line"),
    "paint the fence": ("The paint was green, and there was a lot of it.", "the fence", "the fence shone in the sun like new"),
    "learn to play the drum": ("The drum had belonged to an uncle who lived far away.", "the drum", "the whole street stopped to listen to the drum"),
    "send a letter to a friend": (
        "The letter was long and had a drawing on the last page.",
        "the letter",
        "the letter was on its way with the evening train",
    ),
}
TROUBLES = (
    ("But then it began to rain, and soon everything was wet.", "waited under a roof until the rain stopped", "the weather"),
    ("But {other} wanted to do it another way, and they quarreled.", "said sorry and tried both ways", "being right"),
    ("But the path was blocked by a fallen tree.", "went around it by the stream", "the short way"),
    ("But night came, and they could not see their own hands.", "lit a lantern and walked slowly", "the dark"),
    ("But the most important tool was missing.", "borrowed one from {helper}", "having everything"),
    ("But nothing worked, and {name} wanted to give up.", "rested a little and began once more", "doing it quickly"),
    ("But a big gray goose stood in the way and would not move.", "gave the goose some bread and made a friend", "fear"),
    ("But they had forgotten to bring food, and they were hungry.", "shared the one apple they found", "a full basket"),
)
ADVICE = (
    "Begin with the easy part.",
    "Look twice before you step.",
    "Two heads are better than one.",
    "There is always time to ask.",
    "Do not hurry.",
    "Small steps also lead up the hill.",
    "Listen first and speak after.",
    "What is broken can be mended.",
)
CLOSES = (
    "From that day on, {name} and {other} met there every {day}.",
    "{name} never forgot that day.",
    "That night {name} slept well and dreamed of {thing}.",
    '"We did it together," said {other}, and that was true.',
    "And when people asked how it was done, {name} only smiled.",
    "The next morning they began to think of something new.",
    "{name} had learned that patience is worth more than {lesson}.",
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def story(rng: random.Random) -> str:
    """Three to five paragraphs about one wish."""
    girl = rng.random() < 0.5
    he, his, him = ("she", "her", "her") if girl else ("he", "his", "him")
    name = rng.choice(GIRLS if girl else BOYS)
    other = rng.choice([n for n in GIRLS + BOYS if n != name])
    place, season, wish = rng.choice(list(PLACES)), rng.choice(list(SEASONS)), rng.choice(list(WISHES))
    spot, helper = rng.choice(PLACES[place]), rng.choice(PEOPLE).replace("his/her", his)
    start, thing, success = WISHES[wish]
    trouble, way_out, lesson = rng.choice(TROUBLES)
    words = {
        "name": name,
        "other": other,
        "he": he,
        "He": he.capitalize(),
        "his": his,
        "him": him,
        "place": place,
        "Place": place[0].upper() + place[1:],
        "season": season,
        "wish": wish,
        "spot": spot,
        "helper": helper,
        "Helper": helper[0].upper() + helper[1:],
        "thing": thing,
        "Thing": thing[0].upper() + thing[1:],
        "success": success,
        "lesson": lesson,
        "way_out": way_out.format(name=name, other=other, helper=helper),
        "trait": rng.choice(TRAITS),
        "trait2": rng.choice(TRAITS),
        "advice": rng.choice(ADVICE),
        "day": rng.choice(DAYS),
        "weather": rng.choice(SEASONS[season]),
        "start": start,
    }
    paragraphs = [
        _pick(
            rng,
            words,
            "{name} was a {trait} {child} who lived {place}.",
            "{Place} there lived a {trait} {child} called {name}.",
            "Once there was a {trait} {child} whose name was {name}, and {he} lived {place}.",
            child="girl" if girl else "boy",
        )
        + " "
        + _pick(
            rng, words, "{his_} best friend was {other}, who was {trait2}.", "{He} had one good friend, the {trait2} {other}.", his_=his.capitalize()
        )
        + " "
        + _pick(rng, words, "It was {season}. {weather}", "{weather} It was {season} again.", "One {day} in {season} they met at {spot}. {weather}"),
        _pick(
            rng, words, "{name} wanted to {wish}.", "That morning {name} had a plan: {he} wanted to {wish}.", '"Today I want to {wish}," said {name}.'
        )
        + f" {start} "
        + _pick(
            rng,
            words,
            "{other} liked the plan, and they set out for {spot}.",
            '"I will help you," said {other}. They went to {spot} together.',
            "They talked about it all the way to {spot}.",
        ),
        trouble.format(**words) + " " + _pick(rng, words, '"What now?" asked {other}.', "{name} sat down and thought.", "For a while nobody spoke."),
    ]
    if rng.random() < 0.7:
        paragraphs.append(
            _pick(
                rng,
                words,
                'Just then {helper} came by and heard about it. "{advice}" was all the answer they got.',
                'They met {helper} at {spot}, who listened and then said: "{advice}"',
                '{Helper} saw them and laughed. "{advice}"',
            )
        )
    paragraphs.append(
        _pick(rng, words, "So they {way_out}.", "In the end they {way_out}.", "{name} nodded, and they {way_out}.")
        + " "
        + _pick(
            rng,
            words,
            "Before the sun went down, {success}.",
            "It took a long time, but at last {success}.",
            "And then, when nobody expected it, {success}.",
        )
        + " "
        + rng.choice(CLOSES).format(**words)
    )
    return "\n".join(paragraphs)


def _pick(rng: random.Random, words: dict[str, str], *sentences: str, **more: str) -> str:
    return rng.choice(sentences).format(**words, **more)
