"""The tables that SQL items are about, one line a table; no domain is in two splits.

`plural singular: column=values; …` The second table of a pair belongs to the first and gets a
column `<singular>_id`. Values are `low..high` (whole numbers), `@kind` (names) or a list.
"""

from __future__ import annotations

from adapters.demo.task import Split

DOMAINS: dict[Split, list[tuple[str, str]]] = {
    "train": [
        (
            "customers customer: name=@person; city=@city; age=18..95; points=0..5000",
            "orders order: product=@thing; amount=5..900; status=paid,open,late; year=2012..2024",
        ),
        (
            "students student: name=@person; major=history,biology,physics,music; age=17..99;"
            " credits=0..240; hometown=@city",
            "enrollments enrollment: course=@title; score=0..100; semester=spring,summer,fall",
        ),
        (
            "authors author: name=@person; country=@country; birth_year=1850..1999; awards=0..9",
            "books book: title=@title; genre=crime,poetry,science,travel; pages=60..1200;"
            " year=1900..2024; price=4..90",
        ),
        (
            "departments department: name=@title; building=North,South,East,West;"
            " budget=1000..99000",
            "employees employee: name=@person; role=clerk,engineer,manager,analyst;"
            " salary=20000..150000; age=18..95; city=@city",
        ),
        (
            "teams team: name=@title; league=gold,silver,bronze; founded=1880..2015; city=@city",
            "players player: name=@person; position=goalkeeper,defender,striker; goals=0..300;"
            " height=150..230; country=@country",
        ),
        (
            "albums album: title=@title; label=Echo,Nova,Delta,Harbor; year=1950..2024;"
            " sales=100..90000",
            "songs song: title=@title; length=90..600; genre=jazz,rock,folk,soul; plays=10..99999",
        ),
        (
            "airports airport: code=@title; country=@country; runways=1..8; passengers=900..90000",
            "flights flight: destination=@city; distance=80..9000; airline=Skyline,Aero,Polar;"
            " delay=0..240",
        ),
        (
            "hospitals hospital: name=@title; city=@city; beds=20..1500; rating=1..10",
            "patients patient: name=@person; disease=flu,asthma,measles,migraine; age=1..99;"
            " weight=10..150; blood_type=A,B,AB,O",
        ),
        (
            "restaurants restaurant: name=@title; cuisine=Thai,Greek,Mexican,Indian; seats=10..200;"
            " city=@city; stars=1..5",
            "dishes dish: name=@thing; calories=50..1500; price=3..90; kind=starter,main,dessert",
        ),
        (
            "farms farm: name=@title; region=valley,coast,hills,plain; area=5..900; owner=@person",
            "animals animal: name=@person; species=cow,goat,pig,hen,horse; weight=2..900;"
            " age=1..30",
        ),
        (
            "museums museum: name=@title; city=@city; opened=1800..2020; visitors=500..99000",
            "paintings painting: title=@title; artist=@person; style=cubism,baroque,realism;"
            " value=100..90000; year=1500..2000",
        ),
        (
            "suppliers supplier: name=@title; country=@country; rating=1..10; contact=@person",
            "parts part: name=@thing; color=red,blue,green,black; weight=1..900; price=1..500;"
            " stock=0..800",
        ),
        (
            "hotels hotel: name=@title; city=@city; stars=1..5; rooms=10..600",
            "bookings booking: guest=@person; nights=1..30; cost=50..5000; channel=web,phone,desk",
        ),
        (
            "drivers driver: name=@person; license=A,B,C,D; experience=0..45; rating=1..10",
            "trips trip: destination=@city; distance=1..900; fare=5..700; weather=sun,rain,snow",
        ),
        (
            "planets planet: name=@title; type=rocky,gas,ice; radius=900..90000; moons=0..80",
            "missions mission: name=@title; agency=Orion,Vega,Lyra; year=1960..2024;"
            " cost=10..9000; status=done,failed,planned",
        ),
        (
            "schools school: name=@title; district=North,South,Center; capacity=50..3000",
            "teachers teacher: name=@person; subject=math,art,history,biology; salary=20000..90000;"
            " years=0..45",
        ),
        (
            "directors director: name=@person; country=@country; birth_year=1900..1995",
            "movies movie: title=@title; genre=drama,comedy,horror,western; budget=10..9000;"
            " runtime=70..240; year=1930..2024",
        ),
        (
            "warehouses warehouse: name=@title; city=@city; capacity=100..9000; manager=@person",
            "shipments shipment: item=@thing; weight=1..2000; carrier=Rapid,Falcon,Metro;"
            " year=2005..2024; value=10..9000",
        ),
        (
            "breeders breeder: name=@person; city=@city; licenses=1..9; since=1960..2022",
            "dogs dog: name=@person; breed=poodle,beagle,boxer,collie; weight=2..90; age=1..18",
        ),
        (
            "companies company: name=@title; sector=energy,retail,media,health;"
            " employees=5..9000; revenue=100..99000",
            "products product: name=@thing; category=toy,tool,food,garment; price=1..900;"
            " stock=0..900; rating=1..10",
        ),
        (
            "countries country: name=@country; continent=Asia,Europe,Africa,America;"
            " population=50..99000; area=10..9000",
            "rivers river: name=@title; length=20..7000; depth=1..200; basin=north,south,east,west",
        ),
        (
            "courses course: title=@title; level=basic,middle,advanced; hours=10..300;"
            " teacher=@person",
            "exams exam: room=A1,B2,C3,D4; score=0..100; year=2000..2024; student=@person",
        ),
        (
            "projects project: name=@title; client=@person; budget=500..90000;"
            " priority=low,medium,high",
            "tasks task: title=@title; hours=1..200; status=open,done,blocked; assignee=@person",
        ),
        (
            "buildings building: name=@title; city=@city; floors=1..90; height=5..800",
            "apartments apartment: tenant=@person; rent=300..5000; rooms=1..9; size=20..300",
        ),
        (
            "channels channel: name=@title; topic=cooking,gaming,science; subscribers=100..99000",
            "videos video: title=@title; views=10..99000; likes=0..9000; length=20..3600;"
            " language=English,French,Hindi",
        ),
        (
            "banks bank: name=@title; country=@country; assets=100..99000",
            "accounts account: owner=@person; balance=0..90000; type=savings,checking,joint;"
            " opened=1990..2024",
        ),
        (
            "stations station: name=@title; line=red,blue,green; platforms=1..20;"
            " riders=100..90000",
            "trains train: name=@title; speed=40..320; seats=50..900; operator=Aero,Metro,Union",
        ),
        (
            "gyms gym: name=@title; city=@city; area=50..2000; fee=10..200",
            "members member: name=@person; plan=basic,plus,premium; visits=0..400; age=16..95",
        ),
    ],
    "validation": [
        (
            "gardens garden: name=@title; climate=dry,mild,wet; area=10..900; keeper=@person",
            "plants plant: name=@thing; height=5..900; soil=clay,sand,loam; price=1..300",
        ),
        (
            "ships ship: name=@title; flag=@country; tonnage=100..90000; built=1950..2022",
            "voyages voyage: port=@city; days=2..200; cargo=grain,coal,cars; profit=10..9000",
        ),
        (
            "lawyers lawyer: name=@person; firm=Stone,Reed,Marsh; rate=50..900",
            "trials trial: judge=@person; verdict=guilty,innocent,settled; length=1..300;"
            " fee=100..9000",
        ),
        (
            "festivals festival: name=@title; country=@country; founded=1950..2022;"
            " attendance=500..90000",
            "concerts concert: band=@title; stage=main,tent,forest; tickets=50..9000;"
            " duration=20..240",
        ),
    ],
    "test": [
        (
            "libraries library: name=@title; county=Kent,Essex,Devon,Surrey; volumes=900..90000;"
            " opening_year=1850..2020",
            "readers reader: name=@person; occupation=nurse,baker,pilot,farmer; loans=0..400;"
            " fines=0..300",
        ),
        (
            "vineyards vineyard: name=@title; valley=Loire,Douro,Napa,Mosel; hectares=2..400;"
            " winemaker=@person",
            "wines wine: label=@title; grape=merlot,riesling,malbec; vintage=1940..2023;"
            " bottles=50..9000; cost=5..800",
        ),
        (
            "telescopes telescope: name=@title; observatory=Atlas,Keel,Summit; aperture=10..1000",
            "stars star: name=@title; class=dwarf,giant,neutron; brightness=1..900;"
            " distance_ly=4..9000",
        ),
        (
            "bakeries bakery: name=@title; street=Mill,Oak,Bridge,Church; ovens=1..12;"
            " turnover=500..90000",
            "cakes cake: name=@thing; flavor=lemon,vanilla,carrot,almond; sugar=5..500;"
            " servings=2..90",
        ),
        (
            "publishers publisher: name=@title; headquarters=@city; staff=3..900; website=@title",
            "magazines magazine: title=@title; frequency=weekly,monthly,yearly;"
            " circulation=100..90000; issue_price=1..90",
        ),
        (
            "tournaments tournament: name=@title; surface=clay,grass,carpet; prize=100..90000;"
            " host=@city",
            "matches match: winner=@person; duration=20..400; round=final,semifinal,quarterfinal;"
            " spectators=50..9000",
        ),
        (
            "clinics clinic: name=@title; town=@city; vets=1..15; income=100..90000",
            "pets pet: nickname=@person; kind=parrot,turtle,hamster,rabbit; birth_weight=1..300;"
            " vaccines=0..12",
        ),
        (
            "bridges bridge: name=@title; material=steel,stone,timber; span=10..3000;"
            " architect=@person",
            "inspections inspection: inspector=@person; result=passed,failed,pending;"
            " cracks=0..200; expense=50..9000",
        ),
    ],
}
