"""Words of a synthetic log: what people pay for, search, visit, book, in sentences that carry preference.

A text names a thing (of one topic only), in a manner (of one style only), a brand and a city. Topic and
style are what planted users care about, so a reader of the text can tell who would like it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Indices = npt.NDArray[np.int64]

# fmt: off
TOPICS = {
    "running": (
        "running shoes", "race tickets", "heart rate watches", "trail vests", "compression socks",
        "running belts", "treadmills", "pace charts", "hydration packs", "marathon plans",
        "stride lessons", "running caps",
    ),
    "cooking": (
        "cast-iron pans", "chef knives", "spice boxes", "pasta makers", "recipe books", "cooking classes",
        "pressure cookers", "olive oils", "baking trays", "stand mixers", "sourdough starters",
        "cutting boards",
    ),
    "gardening": (
        "rose bushes", "seed packets", "garden hoses", "raised beds", "compost bins", "lawn mowers",
        "pruning shears", "greenhouses", "bird feeders", "tulip bulbs", "potting soils", "watering cans",
    ),
    "babies": (
        "baby strollers", "diapers", "infant car seats", "baby monitors", "feeding bottles",
        "nursery lamps", "teething rings", "crib sheets", "baby carriers", "toddler shoes", "bath toys",
        "high chairs",
    ),
    "cars": (
        "winter tyres", "car washes", "oil changes", "dash cameras", "parking permits", "brake pads",
        "car insurances", "roof racks", "seat covers", "engine checks", "wiper blades", "charging cables",
    ),
    "pets": (
        "dog leashes", "cat trees", "vet visits", "dog foods", "aquarium pumps", "litter boxes",
        "puppy courses", "hamster wheels", "pet insurances", "chew toys", "cat brushes", "parrot cages",
    ),
    "travel": (
        "flight tickets", "hotel nights", "train passes", "travel insurances", "suitcases",
        "visa services", "guided tours", "airport transfers", "ferry tickets", "city maps",
        "travel pillows", "luggage lockers",
    ),
    "music": (
        "concert tickets", "guitar strings", "vinyl records", "piano lessons", "headphones", "drum kits",
        "sheet music books", "microphones", "violin bows", "festival passes", "synthesizers",
        "singing lessons",
    ),
    "gaming": (
        "game consoles", "gaming mice", "racing wheels", "game passes", "graphics cards",
        "mechanical keyboards", "virtual reality goggles", "arcade nights", "esports tickets",
        "gaming chairs", "game coins", "controller grips",
    ),
    "fashion": (
        "silk dresses", "leather jackets", "designer bags", "sunglasses", "tailored suits", "ankle boots",
        "wool coats", "pearl earrings", "denim jeans", "scarves", "wrist watches", "evening gowns",
    ),
    "health": (
        "blood tests", "vitamin tablets", "dentist appointments", "eye exams", "pharmacy orders",
        "massage sessions", "flu shots", "sleep trackers", "knee braces", "skin checks", "hearing aids",
        "nutrition consultations",
    ),
    "investing": (
        "index funds", "savings accounts", "government bonds", "stock trades", "pension plans",
        "gold bars", "broker fees", "tax consultations", "dividend reports", "currency exchanges",
        "fund statements", "investment seminars",
    ),
    "housing": (
        "rent payments", "mortgage consultations", "moving vans", "apartment viewings", "plumber visits",
        "electricity bills", "heating repairs", "home insurances", "door locks", "water bills",
        "roof repairs", "property valuations",
    ),
    "furniture": (
        "dining tables", "bookshelves", "sofa beds", "floor lamps", "office chairs", "wardrobes",
        "mattresses", "wool rugs", "coffee tables", "curtains", "wall mirrors", "bar stools",
    ),
    "learning": (
        "language courses", "math tutors", "exam fees", "online degrees", "coding bootcamps",
        "library cards", "textbooks", "piano exams", "driving lessons", "study rooms", "chess lessons",
        "scholarship forms",
    ),
    "football": (
        "match tickets", "football boots", "club jerseys", "season passes", "goalkeeper gloves",
        "shin guards", "stadium tours", "fan scarves", "training cones", "football stickers",
        "pitch rentals", "league streams",
    ),
    "photography": (
        "camera lenses", "tripods", "photo prints", "darkroom courses", "memory cards", "camera straps",
        "studio lights", "photo albums", "drone cameras", "lens filters", "portrait sessions",
        "film rolls",
    ),
    "coffee": (
        "espresso machines", "coffee beans", "milk frothers", "barista courses", "cold brews",
        "coffee grinders", "filter papers", "latte cups", "coffee subscriptions", "flat whites",
        "moka pots", "coffee tastings",
    ),
    "hiking": (
        "hiking boots", "tents", "sleeping bags", "mountain hut nights", "rain jackets", "trekking poles",
        "camp stoves", "climbing ropes", "cable car tickets", "compasses", "rucksacks", "headlamps",
    ),
    "beauty": (
        "lipsticks", "face creams", "haircuts", "nail polishes", "perfumes", "sun lotions", "spa days",
        "hair dryers", "eyeliners", "shaving kits", "bath salts", "brow treatments",
    ),
}
STYLES = {
    "thrifty": ("budget", "second-hand", "discounted", "no-frills"),
    "premium": ("luxury", "handmade", "award-winning", "exclusive"),
    "green": ("organic", "recycled", "climate-neutral", "fair-trade"),
}
BRANDS = (
    "Corvane", "Ostrela", "Mirabond", "Halden & Co", "Tessaro", "Pinefold", "Lumora", "Quillon",
    "Brightwick", "Navarro", "Sundrop", "Kestrel", "Oakmere", "Velstra", "Marigold", "Tandem",
    "Bellwether", "Ardenne", "Solhaven", "Foxglove", "Nordlys", "Cinderhall", "Amberway", "Juniper",
    "Larkspur", "Redmoor", "Zephyra", "Copperline", "Willowbank", "Evermont", "Palisade", "Tidewater",
    "Saffronia", "Greystone", "Petalworks", "Ironbridge", "Moonharbor", "Clovercrest", "Stellan",
    "Harborlight",
)
CITIES = (
    "Lisbon", "Hangzhou", "Lagos", "Oslo", "Lima", "Kyoto", "Austin", "Nairobi", "Zurich", "Mumbai",
    "Porto", "Chengdu", "Accra", "Bergen", "Quito", "Osaka", "Denver", "Kampala", "Geneva", "Pune",
    "Madrid", "Shanghai", "Dakar", "Malmo", "Bogota", "Nagoya", "Boston", "Kigali", "Basel", "Jaipur",
    "Naples", "Xiamen", "Cairo", "Aarhus", "Santiago", "Busan", "Seattle", "Durban", "Vienna", "Chennai",
    "Athens", "Suzhou", "Tunis", "Turku", "Montevideo", "Taipei", "Chicago", "Windhoek", "Prague",
    "Hyderabad",
)
# fmt: on

SENTENCES = {
    "bills": "Paid {brand} in {city} for {manner} {thing}",
    "searches": "{manner} {thing} {brand} {city}",
    "visits": "Looked at {manner} {thing} from {brand} in {city}",
    "mini_programs": "Opened the {brand} mini program in {city}: {manner} {thing}",
    "services": "Booked help with {manner} {thing} at {brand}, {city}",
    "coupons": "Saved a {brand} coupon for {manner} {thing}, valid in {city}",
}
"""Text of a channel's behaviors; other channels get a plain sentence that begins with their name."""

ITEM_SENTENCE = "{manner} {thing} by {brand}, delivered from {city}"

THINGS = pa.array([thing for things in TOPICS.values() for thing in things])
MANNERS = pa.array([manner for manners in STYLES.values() for manner in manners])
THINGS_A_TOPIC = len(next(iter(TOPICS.values())))
MANNERS_A_STYLE = len(next(iter(STYLES.values())))
COMBINATIONS = THINGS_A_TOPIC * MANNERS_A_STYLE * len(BRANDS) * len(CITIES)
"""Different texts of one topic and style in one channel; beyond these a number tells them apart."""

_STRIDE = 59_359  # a prime, so that neighbours in rank differ in everything and no two are the same


def channel_sentence(channel: str) -> str:
    """The sentence of a channel's behaviors."""
    return SENTENCES.get(channel, channel.replace("_", " ") + ": {manner} {thing} from {brand} in {city}")


def compose(sentence: str, topic_N: Indices, style_N: Indices, rank_N: Indices) -> pa.Array:
    """Texts of N things: one for each topic, style and rank within them, no two alike."""
    number_N, rest = np.divmod(rank_N, COMBINATIONS)
    rest = (rest * _STRIDE + (topic_N * len(STYLES) + style_N) * 7_919) % COMBINATIONS
    rest, thing_N = np.divmod(rest, THINGS_A_TOPIC)
    rest, manner_N = np.divmod(rest, MANNERS_A_STYLE)
    city_N, brand_N = np.divmod(rest, len(BRANDS))
    words = {
        "thing": THINGS.take(pa.array(topic_N * THINGS_A_TOPIC + thing_N)),
        "manner": MANNERS.take(pa.array(style_N * MANNERS_A_STYLE + manner_N)),
        "brand": pa.array(BRANDS).take(pa.array(brand_N)),
        "city": pa.array(CITIES).take(pa.array(city_N)),
    }
    parts: list[pa.Array | pa.Scalar] = []
    for position, part in enumerate(re.split(r"{(\w+)}", sentence)):
        if position % 2:
            parts.append(words[part])
        elif part:
            parts.append(pa.scalar(part))
    if number_N.any():
        numbered = pc.binary_join_element_wise(" no. ", pa.array(number_N + 1).cast(pa.string()), "")
        parts.append(pc.if_else(pa.array(number_N > 0), numbered, ""))
    return pc.binary_join_element_wise(*parts, "")


def behavior_texts(
    channels: Sequence[str], channel_N: Indices, topic_N: Indices, style_N: Indices, rank_N: Indices
) -> pa.Array:
    """Texts of N atoms, each in the words of its channel."""
    order = np.argsort(channel_N, kind="stable")
    texts = []
    for code, channel in enumerate(channels):
        rows = order[channel_N[order] == code]
        texts.append(compose(channel_sentence(channel), topic_N[rows], style_N[rows], rank_N[rows]))
    inverse = np.empty(len(order), dtype=np.int64)
    inverse[order] = np.arange(len(order))
    return pa.concat_arrays(texts).take(pa.array(inverse))
