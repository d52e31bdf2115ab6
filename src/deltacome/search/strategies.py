"""Which precision plans a search tries. A strategy sees plans and their losses, and nothing of models.

Its plans have a bit-width once, the highest first, and end in `*`, so that any of them fills a budget.
"""

from collections.abc import Callable
from operator import itemgetter
from random import Random

from deltacome.compression.precision import TRIPLE, PrecisionPlan

BITS = (8, 4, 3, 2, 1)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)  # components at a bit-width other than the last

# The losses, infinite where a plan is impossible, of a stage's plans.
Measure = Callable[[str, list[PrecisionPlan]], list[float]]


def greedy(measure: Measure) -> None:
    """The best single bit-width, then the best double built on it, then the best triple on that (paper, section 5.1).

    A plan is built on another by one more bit-width, with every count, at its place among the others.
    """
    plans = [PrecisionPlan(((bits, None),)) for bits in BITS]
    best = _best(plans, measure("single", plans))
    for stage in ("double", "triple"):
        plans = [insert(best, bits, count) for bits in _unused(best) for count in COUNTS]
        best = _best(plans, measure(stage, plans))


def genetic(measure: Measure, generations: int, population: int, seed: int) -> None:
    """A population of plans, the default and random ones at first; the better half stays and has children.

    A child is a crossover of two of the better half, mutated until it is a plan that was not tried before.

    Args:
        generations, population: together at most some thousands, for there are no more than 7381 plans.
    """
    random = Random(seed)
    tried: set[PrecisionPlan] = set()

    def untried(plan: PrecisionPlan) -> PrecisionPlan:
        while plan in tried:
            plan = mutate(plan, random)
        tried.add(plan)
        return plan

    plans = [untried(PrecisionPlan.parse(TRIPLE))]
    plans += [untried(_random_plan(random)) for _ in range(population - 1)]
    losses = measure("generation 1", plans)
    for generation in range(2, generations + 1):
        ranked = [plan for _, plan in sorted(zip(losses, plans, strict=True), key=itemgetter(0))]
        parents = ranked[: population // 2]
        children = (mutate(crossover(random.choices(parents, k=2), random), random) for _ in ranked[len(parents) :])
        plans = parents + [untried(child) for child in children]
        losses = measure(f"generation {generation}", plans)


def insert(plan: PrecisionPlan, bits: int, count: int) -> PrecisionPlan:
    """The plan with one more bit-width for `count` components; at a lower one than all others it takes the rest."""
    *counted, (rest, _) = plan.parts
    return PrecisionPlan((*sorted([*counted, (max(bits, rest), count)], reverse=True), (min(bits, rest), None)))


def mutate(plan: PrecisionPlan, random: Random) -> PrecisionPlan:
    """Another plan: with a bit-width more, or one less, or a count halved or doubled."""
    changed = []
    if unused := _unused(plan):
        changed.append(insert(plan, random.choice(unused), random.choice(COUNTS)))
    if len(plan.parts) > 1:
        kept = list(plan.parts)
        kept.pop(random.randrange(len(kept)))
        changed.append(PrecisionPlan((*kept[:-1], (kept[-1][0], None))))
        resized = list(plan.parts)
        place = random.randrange(len(resized) - 1)
        bits, count = resized[place]
        near = [other for other in COUNTS if count is not None and other in (count // 2, 2 * count)]
        resized[place] = (bits, random.choice(near))
        changed.append(PrecisionPlan(tuple(resized)))
    return random.choice(changed)


def crossover(parents: list[PrecisionPlan], random: Random) -> PrecisionPlan:
    """The last bit-width of one parent, and for each higher one the count, or its absence, of one of them."""
    rest = random.choice(parents).parts[-1][0]
    parts = [(bits, dict(random.choice(parents).parts).get(bits)) for bits in BITS if bits > rest]
    return PrecisionPlan((*((bits, count) for bits, count in parts if count), (rest, None)))


def _random_plan(random: Random) -> PrecisionPlan:
    plan = PrecisionPlan(((random.choice(BITS), None),))
    for _ in range(random.randrange(3)):
        plan = insert(plan, random.choice(_unused(plan)), random.choice(COUNTS))
    return plan


def _unused(plan: PrecisionPlan) -> list[int]:
    return [bits for bits in BITS if bits not in dict(plan.parts)]


def _best(plans: list[PrecisionPlan], losses: list[float]) -> PrecisionPlan:
    return plans[losses.index(min(losses))]
