#!/usr/bin/env python
"""Writes recipes/data/orders_train.jsonl and orders_eval.jsonl: a sentence about an order, and its JSON.

Seeded: the files in the repository are what this script prints. Training and evaluation share no sentence form,
no customer, no item and no city, so a gain on the evaluation rows is not memory of the training rows.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "recipes" / "data"
SEED = 7
INSTRUCTION = "Extract the order as JSON with the keys customer, item, quantity and city."
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]

TRAIN = {
    "rows": 320,
    "forms": [
        "{customer} from {city} ordered {quantity} {item}.",
        "Please send {quantity} {item} to {customer} in {city}.",
        "We received an order for {quantity} {item}; the customer is {customer}, who lives in {city}.",
        "{customer} would like to have {quantity} {item} delivered to {city}.",
        "In {city}, {customer} is waiting for {quantity} {item}.",
        "Ship to {city}: {quantity} {item} for {customer}.",
        "{quantity} {item} were bought by {customer}, {city}.",
        "Our client {customer} called from {city} and asked for {quantity} {item}.",
        "A parcel with {quantity} {item} goes to {city}, addressed to {customer}.",
        "For her office in {city}, {customer} needs {quantity} {item}.",
        "{customer} wrote that {quantity} {item} should arrive in {city} by Friday.",
        "The shop in {city} sold {quantity} {item} to {customer} this morning.",
        "On Monday {customer} paid for {quantity} {item} and gave {city} as the address.",
        "Add {quantity} {item} to the order of {customer} ({city}).",
        "New order. City: {city}. Customer: {customer}. Goods: {quantity} {item}.",
        "Is it possible to bring {quantity} {item} to {city}? They are for {customer}.",
        "From {city} comes an order of {customer}: {quantity} {item}.",
        "We promised {customer} that {quantity} {item} will be in {city} next week.",
        "{quantity} {item}, please, to {city}. Signed: {customer}.",
        "The invoice names {customer} of {city} and lists {quantity} {item}.",
        "{customer}, {quantity} {item}, {city}.",
        "Someone called {customer} wants {quantity} {item}; the place is {city}.",
        "Yesterday {quantity} {item} left for {city}, where {customer} will collect them.",
        "{city} again: this time {customer} takes {quantity} {item}.",
    ],
    "first": "Anna Bruno Carla David Elena Felix Greta Hugo Irene Jonas Karin Leo Maria Nils Olga Paul Rosa Simon "
    "Adele Bastian Chiara Dmitri Edith Fabio Gerda Harald Ines Jakob Katja Lorenzo Mikael Nadia Oscar Petra "
    "Rafael Sofia Thomas Valeria Xavier Pilar Henrik Giulia Emil Dagmar Cornelius Beatrix Anton Lucia",
    "last": "Adler Brandt Castillo Dubois Eriksson Fischer Garcia Hansen Ivanova Jansen Keller Lopez Moreau Novak "
    "Almeida Bergman Conti Delgado Engel Fontaine Greco Holm Iglesias Jung Kovacs Lindqvist Marino Nielsen Orlov "
    "Pereira Ricci Santos Tanaka Ullmann Vidal Winter Yilmaz Zanetti Becker Costa Duarte Ferrari Haas Klein",
    "items": "desk lamps|notebooks|coffee mugs|office chairs|blue pens|travel bags|phone cases|wool scarves|"
    "garden tools|water bottles|picture frames|running shoes|tea pots|bath towels|wall clocks|leather belts|"
    "kitchen knives|paper boxes|winter coats|board games|glass vases|bike helmets|door mats|hair brushes|"
    "sun hats|wooden spoons|alarm clocks|flower pots|pillow covers|tennis balls|rain jackets|salad forks|"
    "camping tents|guitar strings|face masks|oven gloves|steel pans|linen sheets|toy trains|postcards|"
    "bicycles|candles|curtains|ladders|hammers|violins|blankets|sandals|mirrors|helmets|baskets|carpets",
    "cities": "Lyon|Oslo|Porto|Vienna|Krakow|Seville|Ghent|Turin|Malmo|Leipzig|Graz|Bergen|Nantes|Bilbao|Basel|"
    "Tartu|Lisbon|Bordeaux|Gdansk|Florence|Valencia|Antwerp|Odense|Salzburg|Dublin|Split|Naples|Bremen|Lille|"
    "Granada|Uppsala|Brno|Patras|Lausanne|Rotterdam|Cadiz|Trieste|Turku|Vilnius|Coimbra",
}
EVAL = {
    "rows": 60,
    "forms": [
        "Could you deliver {quantity} {item} to {city}? The name is {customer}.",
        "{customer} just bought {quantity} {item} and wants them sent to {city}.",
        "Order note: {customer}, {city}, {quantity} {item}.",
        "There is a request from {city} for {quantity} {item}, made by {customer}.",
        "{quantity} {item} have to reach {customer} in {city} tomorrow.",
    ],
    "first": "Tobias Ursula Viktor Wanda Yvonne Zoltan Amelie Boris Clara Dario",
    "last": "Olsen Petrov Quint Rossi Schmidt Torres Urban Vogel Weber Zimmer",
    "items": "umbrellas|silk ties|candle holders|hiking boots|cotton shirts|soup bowls|desk fans|yoga mats|"
    "key rings",
    "cities": "Utrecht|Zagreb|Cork|Aarhus|Ljubljana|Verona|Tampere|Geneva|Riga",
}


def make_rows(kind: dict, generator: random.Random) -> list[dict[str, str]]:
    """Rows in alpaca form, no sentence twice."""
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < kind["rows"]:
        number = generator.randint(2, 12)
        order = {
            "customer": f"{generator.choice(kind['first'].split())} {generator.choice(kind['last'].split())}",
            "item": generator.choice(kind["items"].split("|")),
            "quantity": number,
            "city": generator.choice(kind["cities"].split("|")),
        }
        written = generator.choice([str(number), NUMBERS[number - 1]])
        sentence = generator.choice(kind["forms"]).format(**{**order, "quantity": written})
        sentence = sentence[0].upper() + sentence[1:]
        rows[sentence] = {"instruction": INSTRUCTION, "input": sentence, "output": json.dumps(order)}
    return list(rows.values())


def main() -> None:
    generator = random.Random(SEED)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, kind in (("train", TRAIN), ("eval", EVAL)):
        rows = make_rows(kind, generator)
        file = FOLDER / f"orders_{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"wrote {len(rows)} rows to {file.name}")


if __name__ == "__main__":
    main()
