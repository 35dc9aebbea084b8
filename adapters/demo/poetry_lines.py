"""The words poems are made of, all written for this project.

`{t}` is the topic, `{a}` an adjective of the mood. A topic belongs to a theme; its last four
topics are test, the two before them validation, the rest train.
"""

from __future__ import annotations

TOPICS = {
    "sea": "wave harbor shell whale tide sailor boat gull reef lagoon island dolphin"
    " anchor beach lighthouse pier",
    "sky": "moon star cloud sun comet planet eagle balloon swallow dawn meteor lark"
    " rainbow sunset falcon galaxy",
    "weather": "rain snow wind fog frost breeze hail drizzle blizzard gale mist tempest"
    " storm thunder sleet whirlwind",
    "forest": "oak leaf moss path pine cabin fern willow acorn creek birch cedar"
    " maple trail mushroom thicket",
    "garden": "rose tulip bee seed hedge lily apple snail fountain daisy poppy ivy"
    " butterfly orchard sunflower ladybug",
    "home": "lamp door window chair clock stair pillow carpet mirror candle curtain sofa"
    " blanket kettle attic drawer",
    "food": "bread soup cake tea pie rice pasta butter pancake coffee waffle muffin"
    " honey cheese cookie stew",
    "city": "street bus tower market taxi square alley subway station crowd tram plaza"
    " bridge sidewalk museum highway",
    "music": "song drum flute piano choir banjo cello waltz trumpet anthem harp chord"
    " violin guitar ballad organ",
    "work": "hammer needle painter baker teacher ladder loom shovel tailor pencil wrench potter"
    " carpenter doctor anvil plumber",
    "farm": "cow barn hen wheat tractor goat pony lamb duck meadow pasture plow"
    " horse piglet haystack donkey",
    "time": "winter spring morning evening midnight noon sunday weekend july decade april twilight"
    " autumn summer minute century",
    "mind": "hope dream love courage memory wisdom patience faith sorrow truth reason mercy"
    " silence freedom kindness wonder",
    "play": "ball kite puppet swing puzzle doll marble yoyo slide rocket hoop scooter"
    " toy seesaw trampoline frisbee",
    "animals": "cat dog fox bear wolf tiger rabbit mouse hedgehog otter badger panda"
    " squirrel lion monkey zebra",
}

THEMES = {
    "sea": (
        ("The {a} {t} rests beside the sea,", "Where salt and wind and waves run free."),
        ("I saw the {a} {t} at the bay,", "Where silver fish and children play."),
        ("Beyond the sand the {a} {t} gleams,", "As wide and blue as summer dreams."),
        ("The tide rolls in, the tide rolls out,", "The {a} {t} hears the sailors shout."),
        ("The {a} {t} greets the morning foam,", "And leads the weary sailor home."),
        ("There's salty breeze and golden sand,", "The {a} {t} waits close to land."),
    ),
    "sky": (
        ("The {a} {t} hangs above the town,", "And sends its gentle glory down."),
        ("Look up and see the {a} {t} glow,", "High over hills and fields below."),
        ("The {a} {t} fills the evening sky,", "As softly as a lullaby."),
        ("Above the roofs the {a} {t} stays,", "And warms the long and drowsy days."),
        ("The {a} {t} watched the world go by,", "A tiny jewel in the sky."),
        ("So far away, so high, so clear,", "The {a} {t} still feels very near."),
    ),
    "weather": (
        ("The {a} {t} came to town today,", "And chased the idle birds away."),
        ("I heard the {a} {t} at my door,", "It knocked, and then it knocked once more."),
        ("The {a} {t} moves across the plain,", "And taps upon the window pane."),
        ("The {a} {t} wraps the sleeping hill,", "And all the sheep grow hushed and still."),
        ("The sky grows dark, the branches bend,", "The {a} {t} greets me like a friend."),
        ("The {a} {t} whistles down the lane,", "And hums its old and wild refrain."),
    ),
    "forest": (
        ("The {a} {t} hides among the trees,", "And listens to the humming bees."),
        ("Deep in the wood the {a} {t} waits,", "Behind the ferns and mossy gates."),
        ("The {a} {t} knows the forest floor,", "Its roots, its paths, its ancient lore."),
        ("Where dappled light falls soft and green,", "The {a} {t} is seldom seen."),
        ("The {a} {t} stands where rivers bend,", "And every creature is its friend."),
        ("I met the {a} {t} in the shade,", "The finest thing the forest made."),
    ),
    "garden": (
        ("The {a} {t} wakes beside the wall,", "Before the first warm petals fall."),
        ("In garden beds both neat and wide,", "The {a} {t} has a place to hide."),
        ("The {a} {t} drinks the morning dew,", "And wears a robe of gold and blue."),
        ("Among the flowers, row on row,", "The {a} {t} loves to see them grow."),
        ("The gate swings wide, the paths are bright,", "The {a} {t} is a sweet delight."),
        ("The {a} {t} basks in summer heat,", "With daisies dancing at its feet."),
    ),
    "home": (
        ("The {a} {t} waits beside the bed,", "And guards the dreams inside my head."),
        ("Inside my house the {a} {t} stays,", "A friend through all my working days."),
        ("The {a} {t} in the corner stands,", "Worn smooth by many loving hands."),
        ("When I come home at end of day,", "The {a} {t} takes my cares away."),
        ("The {a} {t} knows each creaking floor,", "Each tiny sound, each closing door."),
        ("The fire burns low, the rooms are warm,", "The {a} {t} fears no passing storm."),
    ),
    "food": (
        ("The {a} {t} sits upon my plate,", "It smells so good I cannot wait."),
        ("I set the {a} {t} on the table,", "And eat as much as I am able."),
        ("The kitchen hums, the oven glows,", "The {a} {t} tempts my eager nose."),
        ("The {a} {t} warms me to the bone,", "It tastes of every joy I've known."),
        ("My grandma made the {a} {t} sweet,", "And called us in to come and eat."),
        ("A pinch of salt, a spoon of spice,", "The {a} {t} tastes so very nice."),
    ),
    "city": (
        ("The {a} {t} hums in morning light,", "And never seems to sleep at night."),
        ("Along the road of brick and stone,", "The {a} {t} is not alone."),
        ("The {a} {t} shines in evening rain,", "Beside the rumble of the train."),
        ("A thousand people hurry past,", "The {a} {t} saw them, first to last."),
        ("The {a} {t} knows the city beat,", "The rhythm of a million feet."),
        ("Beneath the windows, tall and gray,", "The {a} {t} starts another day."),
    ),
    "music": (
        ("The {a} {t} sings a tune for me,", "As sweet as any song can be."),
        ("I hear the {a} {t} start to play,", "And all my worries drift away."),
        ("The {a} {t} fills the silent hall,", "Its echoes dance along the wall."),
        ("One note, then two, then three, then four,", "The {a} {t} makes us call for more."),
        ("The {a} {t} keeps a steady beat,", "It moves my hands, it moves my feet."),
        ("When lights go down and voices cease,", "The {a} {t} brings a kind of peace."),
    ),
    "work": (
        ("The {a} {t} works from dawn till dark,", "And on the world it leaves a mark."),
        ("With patient care and skillful hand,", "The {a} {t} makes what we have planned."),
        ("The {a} {t} knows the way to mend,", "And serves us like an honest friend."),
        ("The work is long, the work is slow,", "The {a} {t} still has far to go."),
        ("The {a} {t} starts at break of day,", "And hums a tune along the way."),
        ("A little dust, a little sweat,", "The {a} {t} is not finished yet."),
    ),
    "farm": (
        ("The {a} {t} greets the rising sun,", "Before the chores have been begun."),
        ("Across the field of corn and hay,", "The {a} {t} spends a sunny day."),
        ("The {a} {t} stands beside the gate,", "And does not mind that I am late."),
        ("The rooster crows, the day is new,", "The {a} {t} has a lot to do."),
        ("The {a} {t} rests beside the stream,", "And falls into a grassy dream."),
        ("Down on the farm where grass is deep,", "The {a} {t} hears the bleating sheep."),
    ),
    "time": (
        ("The {a} {t} comes on quiet feet,", "And paints the sky above the street."),
        ("I love the {a} {t} most of all,", "It dances lightly on the wall."),
        ("The {a} {t} slips beneath the door,", "As it has done so oft before."),
        ("The hours turn, the shadows grow,", "The {a} {t} says it has to go."),
        ("The {a} {t} settles on the hill,", "And for a while the world is still."),
        ("A page is turned, a bell is rung,", "The {a} {t} keeps the planet young."),
    ),
    "mind": (
        ("The {a} {t} lives inside my heart,", "And there it plays a secret part."),
        ("No hand can hold the {a} {t} long,", "It comes and passes like a song."),
        ("The {a} {t} guides me through the night,", "A little flame, a steady light."),
        ("I cannot buy, I cannot sell,", "The {a} {t} that I know so well."),
        ("The {a} {t} speaks when all is still,", "And lends me strength to climb the hill."),
        ("I searched the world both far and wide,", "The {a} {t} was right here inside."),
    ),
    "play": (
        ("The {a} {t} waits inside the park,", "And we will play until it's dark."),
        ("Come out and bring the {a} {t} too,", "There are so many games to do."),
        ("The {a} {t} spins around and round,", "And tumbles lightly to the ground."),
        ("With all my friends I laugh and run,", "The {a} {t} is the greatest fun."),
        ("The {a} {t} by the toy box lies,", "And waits for little hands and eyes."),
        ("One jump, two jumps, and then one more,", "The {a} {t} shakes the wooden floor."),
    ),
    "animals": (
        ("The {a} {t} dozes in the sun,", "And dreams of races it has won."),
        ("I met the {a} {t} on the trail,", "It blinked at me and shook its tail."),
        ("The {a} {t} prowls beneath the moon,", "And hums a strange and ancient tune."),
        ("On padded feet, with eyes so bright,", "The {a} {t} wanders through the night."),
        ("The {a} {t} knows the hills by heart,", "And greets each day as a new start."),
        ("Through fallen leaves and tangled vine,", "The {a} {t} is a friend of mine."),
    ),
}

ADJECTIVES = {
    "happy": ("merry", "cheerful", "bright"),
    "sad": ("lonely", "weary", "fading"),
    "calm": ("quiet", "gentle", "peaceful"),
    "playful": ("silly", "giddy", "cheeky"),
    "hopeful": ("golden", "patient", "shining"),
    "proud": ("noble", "mighty", "steadfast"),
    "mysterious": ("secret", "hidden", "nameless"),
    "grateful": ("humble", "treasured", "faithful"),
}

MOODS = {
    "happy": (
        ("So clap your hands and sing along,", "The whole wide world is one glad song."),
        ("My heart is light, my step is free,", "There's joy enough for you and me."),
        ("I laugh out loud, I spin around,", "There's gladness in the smallest sound."),
        ("The sun is up, the sky is clear,", "And everyone I love is near."),
        ("I would not trade this golden hour,", "For any crown, for any power."),
        ("Today is warm, today is bright,", "I'll keep this smile until tonight."),
        ("Let bells ring out, let dancers sway,", "For this has been a perfect day."),
    ),
    "sad": (
        ("But all good things must fade away,", "And no one asked the light to stay."),
        ("A tear has fallen, soft and slow,", "For things I loved so long ago."),
        ("The empty road runs on and on,", "And those who walked with me are gone."),
        ("I call a name, but none replies,", "And evening gathers in my eyes."),
        ("The days are cold, the nights are long,", "And no one hums the old sweet song."),
        ("I keep a letter, thin and torn,", "From days before my heart was worn."),
        ("So let me sit a while and grieve,", "For everything that had to leave."),
    ),
    "calm": (
        ("The air is still, the hour is slow,", "There is no other place to go."),
        ("I close my eyes and breathe in deep,", "The silent hills are half asleep."),
        ("No hurry now, no noise, no race,", "Just silence and a little space."),
        ("The water shines, as smooth as glass,", "I let the little worries pass."),
        ("So rest a while and do not speak,", "And feel the breeze upon your cheek."),
        ("The evening folds its silver wings,", "And hushes all the restless things."),
        ("A single breath, a single sigh,", "A slow white cloud goes drifting by."),
    ),
    "playful": (
        ("It wears a hat, it tells a joke,", "It tickles all the village folk."),
        ("It hops on left, it hops on right,", "And giggles half the starry night."),
        ("Oh catch it, catch it, if you can,", "It danced inside a frying pan!"),
        ("It bumped its nose, it lost its shoe,", "It waved hello and vanished too."),
        ("It ate my socks, it stole my cake,", "And jumped right in the village lake."),
        ("So wiggle, wobble, twist and spin,", "And wear your very widest grin."),
        ("Who knew that it could juggle pears,", "And tumble slowly down the stairs?"),
    ),
    "hopeful": (
        ("Tomorrow brings another chance,", "To lift our heads and join the dance."),
        ("The night is dark, but dawn is near,", "And there is nothing left to fear."),
        ("A little seed beneath the snow,", "Needs only time and warmth to grow."),
        ("So take my hand and come along,", "We'll build a bridge, we'll write a song."),
        ("Beyond the hills a light appears,", "To dry the very last of tears."),
        ("However steep the road may be,", "There's something good ahead for me."),
        ("The clouds will part, the sun will rise,", "And paint with gold the waiting skies."),
    ),
    "proud": (
        ("We hold our heads up to the sky,", "And let our brightest banners fly."),
        ("No storm could ever make it bend,", "It stood its ground until the end."),
        ("So sound the horn and beat the drum,", "And tell them all how far we've come."),
        ("It never stumbled, never fell,", "And has a noble tale to tell."),
        ("With steady heart and open hand,", "It is the finest in the land."),
        ("Let every voice give out a cheer,", "The best of all is standing near."),
        ("It grew so strong, it grew so tall,", "And it shall never, never fall."),
    ),
    "mysterious": (
        ("But no one knows from where it came,", "And no one dares to speak its name."),
        ("A whisper moves behind the stair,", "I turn my head, but none is there."),
        ("It holds a riddle, dark and deep,", "A secret only shadows keep."),
        ("A door stands open in the mist,", "To places that do not exist."),
        ("At midnight, when the candles die,", "You may just hear its distant cry."),
        ("It leaves no footprint, makes no sound,", "And what it hides is never found."),
        ("The mirror cracks, the lantern fades,", "And something stirs among the shades."),
    ),
    "grateful": (
        ("I thank the stars, I thank the day,", "For every gift along the way."),
        ("For all it gave, for all it gives,", "My thanks will last while my heart lives."),
        ("How small I was, how much I had,", "A hundred reasons to be glad."),
        ("I count my blessings, one by one,", "And think of all that has been done."),
        ("So here's my thanks, in simple rhyme,", "For every hour of borrowed time."),
        ("I bow my head, I softly say,", "My thanks for this and every day."),
        ("What more could anybody need,", "Than one kind word and one kind deed?"),
    ),
}
