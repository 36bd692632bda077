"""English words that keys and lists are made of."""

from __future__ import annotations

_ADJECTIVES = (
    "amber ancient bitter blue bold brave brief bright broken calm careful cheap clever cold common copper cruel "
    "curious dark deep distant eager early empty fancy fast final foreign fragile gentle golden grand green happy "
    "heavy hidden hollow honest humble idle iron jolly keen kind late lazy little local lonely loud lucky mellow "
    "modern narrow noble odd old orange pale patient perfect plain polite proud purple quick quiet rapid rare red "
    "rough royal sad salty secret sharp shy silent silver simple sleepy slow small smooth soft solid square steady "
    "steep stiff strange strong sudden sweet tall tame tender thin tidy tiny vast violet warm weak wide wild wise "
    "wooden yellow young"
)
_NOUNS = (
    "anchor apple arrow badge basket beach bell bird boat bottle branch bread bridge brush bucket butter button cabin "
    "camel candle canyon carpet castle chair cherry circle clock cloud coat coin corner cotton cradle crystal curtain "
    "desert diamond door dragon drum eagle engine feather fence field finger flag flower forest fountain garden gate "
    "ghost glass glove grape hammer harbor helmet hill horse island jacket jewel kettle kitchen ladder lake lamp "
    "lemon letter lion market meadow mirror moon mountain needle ocean onion orchard owl paper pearl pencil pepper "
    "piano pillow pocket potato prince pumpkin rabbit river road rocket roof rope sailor salmon scarf shadow shell "
    "ship shoulder silk singer spider spoon station stone storm summer sword table temple thunder tiger tower train "
    "tunnel turtle valley village violin wagon wall whale wheel window winter wolf"
)


def _listed(words: str) -> list[str]:
    return words.split()


ADJECTIVES, NOUNS = _listed(_ADJECTIVES), _listed(_NOUNS)
KEYS = [f"the {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
