"""Plain words that the generated tasks are made of."""

WORDS = (
    "apple anchor arrow autumn banjo barrel basket beacon blanket bottle branch bridge bucket butter button cabin "
    "camel candle canyon carpet castle cedar chapel cherry circle clover copper cotton cradle cricket curtain daisy "
    "desert dragon drum eagle ember engine falcon feather fiddle flame forest fountain garden ginger glacier goose "
    "granite guitar hammer harbor hazel helmet honey island ivory jacket jungle kettle kitten ladder lantern lemon "
    "lizard magnet mango maple marble meadow mirror monkey mountain needle nickel oak ocean olive onion orchard otter "
    "oyster paddle palace parrot pebble pencil pepper piano pigeon pillow planet pocket poplar rabbit raven ribbon "
    "river rocket saddle salmon sandal shadow shovel silver sparrow spider spoon spring squirrel stable statue sugar "
    "summer sunset temple thunder tiger tomato torch tower tractor trumpet tulip tunnel turtle valley velvet violin "
    "walnut whale willow window winter wizard yellow zebra"
).split()
NAMES = (
    "Alice Bruno Clara David Elena Felix Grace Henry Irene James Karen Louis Maria Nolan Oscar Paula Quentin Rosa "
    "Simon Teresa Ursula Victor Wanda Xavier Yvonne Zachary"
).split()
CITIES = (
    "Athens Berlin Boston Cairo Chicago Dublin Geneva Hamburg Istanbul Lisbon London Madrid Milan Moscow Munich Naples "
    "Oslo Paris Prague Rome Seattle Sydney Tokyo Toronto Vienna Warsaw"
).split()
JOBS = (
    "baker barber builder butcher carpenter cook dentist doctor farmer fisherman gardener judge lawyer mechanic nurse "
    "painter pilot plumber sailor singer tailor teacher writer"
).split()
COLOURS = (
    "beige black blue brown crimson golden green grey orange pink purple red turquoise violet white yellow".split()
)
