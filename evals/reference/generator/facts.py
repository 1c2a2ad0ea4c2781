"""Tables of facts and relations, each a row of `key/value` pairs: what the questions ask and the prose tells."""

from __future__ import annotations


def _pairs(rows: str) -> dict[str, str]:
    return {key.replace("_", " "): value.replace("_", " ") for key, value in (row.split("/") for row in rows.split())}


CAPITALS = _pairs(
    "France/Paris Germany/Berlin Italy/Rome Spain/Madrid Portugal/Lisbon Austria/Vienna Poland/Warsaw Greece/Athens Norway/Oslo Sweden/Stockholm "
    "Finland/Helsinki Denmark/Copenhagen Ireland/Dublin Belgium/Brussels Hungary/Budapest Egypt/Cairo Kenya/Nairobi Japan/Tokyo China/Beijing "
    "India/Delhi Iran/Tehran Iraq/Baghdad Turkey/Ankara Russia/Moscow Cuba/Havana Peru/Lima Chile/Santiago Canada/Ottawa Brazil/Brasilia"
)
OPPOSITES = _pairs(
    "hot/cold big/small up/down day/night fast/slow old/young happy/sad open/closed full/empty hard/soft light/dark rich/poor strong/weak wet/dry "
    "high/low long/short near/far early/late clean/dirty loud/quiet first/last thick/thin true/false left/right"
)
YOUNG = _pairs(
    "dog/puppy cat/kitten cow/calf sheep/lamb horse/foal goat/kid pig/piglet duck/duckling hen/chick frog/tadpole bear/cub deer/fawn "
    "goose/gosling swan/cygnet"
)
SOUNDS = _pairs(
    "dog/barks cat/meows cow/moos sheep/bleats horse/neighs duck/quacks pig/oinks lion/roars bee/buzzes owl/hoots snake/hisses wolf/howls"
)
PAST = _pairs(
    "go/went see/saw eat/ate run/ran take/took give/gave come/came write/wrote sing/sang swim/swam think/thought buy/bought find/found fly/flew "
    "know/knew make/made say/said sleep/slept"
)
HOMES = _pairs("bird/nest bee/hive spider/web horse/stable dog/kennel bear/cave fish/sea rabbit/burrow cow/barn ant/hill lion/savanna camel/desert")
JOBS = _pairs(
    "bakes_bread/baker grows_food/farmer teaches_children/teacher heals_the_sick/doctor puts_out_fires/firefighter flies_planes/pilot "
    "builds_houses/builder catches_fish/fisher cuts_hair/barber paints_pictures/painter writes_books/writer cooks_meals/cook sells_meat/butcher "
    "mends_shoes/cobbler delivers_letters/postman"
)
USES = _pairs(
    "cut_paper/scissors dig_a_hole/spade drive_a_nail/hammer sweep_the_floor/broom tell_the_time/clock boil_water/kettle open_a_lock/key "
    "write_a_letter/pen measure_length/ruler see_far_away/telescope sew_a_button/needle light_a_room/lamp keep_off_rain/umbrella cut_wood/saw"
)
MATERIALS = _pairs(
    "milk/cheese grapes/wine flour/bread wool/sweaters clay/bricks sand/glass trees/paper cotton/shirts cocoa/chocolate olives/oil tomatoes/ketchup"
)
KINDS = {
    name: words.split()
    for name, words in {
        "fruit": "apple pear plum cherry lemon mango grape melon banana",
        "animal": "dog cat cow horse sheep lion goat bear wolf",
        "color": "red blue green yellow black white brown purple orange",
        "tool": "hammer saw drill rake spade axe wrench",
        "vehicle": "car bus train ship plane truck bicycle",
        "metal": "iron gold silver copper tin lead zinc",
        "planet": "Mars Venus Saturn Jupiter Neptune Uranus Mercury",
        "body part": "arm leg hand foot knee elbow nose ear",
    }.items()
}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
