"""Makes `examples/orders/{train,valid}.jsonl`: an order in a sentence or two in, JSON with four fields out.

    python -m examples.make_orders      # from the root of the repository

The rows are in OpenAI's chat format, and made of templates and word lists. Templates, items and cities of the
validation rows occur in no training row; only quantities and days are shared. Every run gives the same bytes.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from olora_core.seeds import seed_of

OUT = Path(__file__).parent / "orders"
SYSTEM = "Write the order as JSON with item, quantity, city and day."
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = (
    *("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
QUANTITIES = (
    {name: number for number, name in enumerate(NUMBERS, start=2)}
    | {"a pair of": 2, "a couple of": 2, "half a dozen": 6, "a dozen": 12, "two dozen": 24}
    | {str(number): number for number in (3, 5, 8, 15, 25, 30, 36, 40, 48, 50, 60, 75, 90, 100, 150)}
)
"""How an order may say a quantity, and which number that is."""


@dataclass(frozen=True)
class Vocabulary:
    """What the rows of one file are made of."""

    with_day: tuple[str, ...]
    """Templates of orders for a day: {order} is quantity and item."""
    without_day: tuple[str, ...]
    greetings: tuple[str, ...]
    closings: tuple[str, ...]
    kinds: tuple[str, ...]
    things: tuple[str, ...]
    cities: tuple[str, ...]


TRAINING = Vocabulary(
    with_day=(
        "Please send {order} to {city} by {day}.",
        "We need {order} in {city} on {day}.",
        "Can you deliver {order} to our shop in {city} before {day}?",
        "I would like to order {order}, to arrive in {city} on {day}.",
        "{day} delivery to {city}: {order}.",
        "Our {city} office has run out of everything. Send {order} by {day} at the latest.",
        "For {day} we want {order}. The address is in {city}.",
        "Put {order} on the van that leaves for {city} on {day}.",
        "Could {order} reach {city} by {day}?",
        "The customer in {city} asked for {order} and is at home on {day}.",
        "On {day} the {city} branch expects {order}.",
        "Ship {order}, destination {city}, due {day}.",
        "By {day}, {order} for the school in {city}.",
        "Add an order: {order}, {city}, {day}.",
    ),
    without_day=(
        "Please send {order} to {city}.",
        "We need {order} for the warehouse in {city}, whenever you can.",
        "Order for {city}: {order}.",
        "My sister in {city} would like {order}.",
        "Can I get {order} delivered to {city}? There is no hurry.",
        "The hotel in {city} is asking for {order}.",
    ),
    greetings=("", "", "", "Hello,\n", "Good morning! ", "Hi Anna! ", "Dear team,\n"),
    closings=("", "", "", " Thank you!", " Thanks, Peter", " Call me if there is a problem."),
    kinds=("", "", "red ", "wooden ", "small ", "cheap ", "leather ", "folding ", "white ", "large "),
    things=(
        *("chairs", "lamps", "notebooks", "pencils", "towels", "pillows", "mirrors", "buckets", "ladders"),
        *("blankets", "teapots", "umbrellas", "candles", "shelves", "carpets", "curtains", "baskets"),
        *("hammers", "brushes", "bottles", "jackets", "gloves", "helmets", "tables", "clocks", "vases"),
        *("printers", "keyboards", "monitors", "screws", "nails", "hinges", "radiators", "fans", "stoves"),
        *("freezers", "cups", "bowls", "forks", "knives", "trays", "jars", "tulips", "roses", "bricks"),
        *("tiles", "pipes", "wheels", "tyres", "saddles", "bicycles", "skis", "balls", "rackets"),
        *("guitars", "trumpets", "pianos", "flutes", "cameras", "radios", "watches", "rings", "scarves"),
        *("belts", "socks", "shirts", "hats", "sandals", "backpacks", "envelopes", "stamps", "folders"),
        *("calendars", "posters", "paintings", "magnets", "drills", "saws", "shovels", "rakes", "hoses"),
        *("benches", "stools", "cushions", "mattresses", "aprons", "napkins"),
    ),
    cities=(
        *("London", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Prague", "Dublin", "Oslo", "Lisbon"),
        *("Athens", "Boston", "Chicago", "Denver", "Seattle", "Toronto", "Sydney", "Leeds", "Hamburg"),
        *("Munich", "Milan", "Naples", "Geneva", "Zurich", "Cairo", "Nairobi", "Mumbai", "Tokyo"),
        *("Bristol", "Cardiff", "Liverpool", "Manchester", "Brighton", "Oxford", "Norwich", "Cologne"),
        *("Stuttgart", "Leipzig", "Bremen", "Hanover", "Salzburg", "Basel", "Bern", "Nantes", "Toulouse"),
        *("Marseille", "Bordeaux", "Lille", "Barcelona", "Valencia", "Bilbao", "Granada", "Porto"),
        *("Bologna", "Florence", "Venice", "Palermo", "Verona", "Rotterdam", "Utrecht", "Antwerp", "Ghent"),
        *("Brussels", "Copenhagen", "Stockholm", "Gothenburg", "Riga", "Vilnius", "Tallinn", "Krakow"),
        *("Budapest", "Bucharest", "Sofia", "Belgrade", "Zagreb", "Istanbul", "Ankara", "Lagos", "Accra"),
        *("Tunis", "Durban", "Delhi", "Bangalore", "Bangkok", "Manila", "Jakarta", "Seoul", "Kyoto"),
        *("Brisbane", "Perth", "Auckland", "Vancouver", "Calgary", "Ottawa", "Quebec", "Houston"),
        *("Phoenix", "Atlanta", "Memphis", "Portland", "Detroit", "Baltimore", "Miami", "Havana", "Lima"),
        *("Bogota", "Santiago"),
    ),
)
HELD_OUT = Vocabulary(
    with_day=(
        "We are opening in {city} on {day} and still lack {order}.",
        "Is it possible to have {order} in {city} for {day}?",
        "{city} wants {order}. They close early, so make it {day}.",
        "Send someone to {city} with {order} this {day}.",
        "The museum in {city} will take {order}, but only if you come on {day}.",
        "Reserve {order} for me. I pick them up in {city} next {day}.",
    ),
    without_day=(
        "How soon can {order} be in {city}?",
        "A new client, based in {city}, is interested in {order}.",
    ),
    greetings=("", "", "Hey! ", "Good evening. "),
    closings=("", "", " Best regards, Laura", " Let me know."),
    kinds=("", "", "green ", "metal ", "heavy ", "round ", "used "),
    things=(
        *("desks", "spoons", "kettles", "ropes", "tents", "scissors", "suitcases", "drums", "boots"),
        *("violins", "batteries", "sofas", "plates", "pumps", "ovens", "wallets", "canoes", "harps"),
        *("sweaters", "barrels"),
    ),
    cities=(
        *("Glasgow", "Warsaw", "Helsinki", "Lyon", "Seville", "Dallas", "Montreal", "Melbourne", "Osaka"),
        *("Dresden", "Turin", "Bergen", "Plymouth", "Nuremberg", "Malaga", "Genoa", "Adelaide"),
        *("Cleveland", "Shanghai", "Casablanca"),
    ),
)
FILES = {"train.jsonl": (TRAINING, 360), "valid.jsonl": (HELD_OUT, 80)}
"""What each file is made of, and its number of rows."""

Row = dict[str, list[dict[str, str]]]


def rows(vocabulary: Vocabulary, number: int) -> list[Row]:
    """The first `number` orders with different answers."""
    found: dict[str, Row] = {}
    for row in orders(vocabulary):
        found.setdefault(row["messages"][1]["content"], row)
        if len(found) == number:
            break
    return list(found.values())


def orders(v: Vocabulary) -> Iterator[Row]:
    """Orders without end, of which one in four has no day."""
    # Python promises the same numbers in every version for random() alone, not for choice or sample.
    draw = random.Random(seed_of("orders")).random
    parts = (v.kinds, v.things, v.cities, tuple(QUANTITIES), v.greetings, v.closings)
    with_day, without_day = dealt(v.with_day, draw), dealt(v.without_day, draw)
    days, dealers = dealt(DAYS, draw), [dealt(part, draw) for part in parts]
    for number in count():
        day = None if number % 4 == 3 else next(days)
        template = next(with_day if day else without_day)
        kind, thing, city, quantity, greeting, closing = map(next, dealers)
        text = template.format(order=f"{quantity} {kind}{thing}", city=city, day=day)
        text = greeting + text[0].upper() + text[1:] + closing
        order = {"item": kind + thing, "quantity": QUANTITIES[quantity], "city": city, "day": day}
        yield row_of(text, order)


def dealt(choices: tuple[str, ...], draw: Callable[[], float]) -> Iterator[str]:
    """The choices like cards: in another order each time that all are used up."""
    while True:
        yield from sorted(choices, key=lambda _: draw())


def row_of(text: str, order: dict[str, str | int | None]) -> Row:
    messages = {"system": SYSTEM, "user": text, "assistant": json.dumps(order)}
    return {"messages": [{"role": role, "content": content} for role, content in messages.items()]}


def as_jsonl(found: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in found)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for name, (vocabulary, number) in FILES.items():
        (OUT / name).write_text(as_jsonl(rows(vocabulary, number)), encoding="utf-8", newline="\n")
        print(f"{name}: {number} rows")


if __name__ == "__main__":
    main()
