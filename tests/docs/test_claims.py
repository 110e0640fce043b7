"""What the text says of Table I, of sharpness and of wrong labels is what the committed runs say."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from functools import partial

import pytest

from benchmarks.paper import demo, memorising, noise
from benchmarks.paper import sharpness_study as study
from benchmarks.paper.runs import NETWORKS, Result, by_cell, read_runs
from sam_fused.sharpness import KINDS
from tests.docs.tables import RECIPES, RESULTS, cells_of, ratio, read
from tests.helpers.paths import ROOT

BASES = ("sgd", "adam")
SWEEPS = {**{recipe: f"cpu-{recipe}" for recipe in RECIPES}, "large": "large-fair", "all": "all-fair"}
READ = {recipe: read_runs(RESULTS / sweep) for recipe, sweep in SWEEPS.items()}
RUNS = {recipe: by_cell(r for r in runs if not r.in_grid) for recipe, runs in READ.items()}
HELD = {
    recipe: json.loads((RESULTS / sweep / "sharpness.json").read_text())
    for recipe, sweep in SWEEPS.items()
    if recipe != "all"
}
RHO = {recipe: study.recipe_of(next(iter(RUNS[recipe].values()))[0].settings)[0] for recipe in SWEEPS}
WORDS = "none, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve"
IN_WORDS = dict(enumerate(WORDS.split(", ")))
Value = Callable[[str, Result], float]


def last(key: str) -> Value:
    return lambda recipe, r: r.metrics[-1][key]


def measured(kind: str) -> Value:
    return lambda recipe, r: HELD[recipe][r.name][-1][kind]


def recorded(recipe: str, r: Result) -> float:
    return r.sharpness(RHO[recipe])[-1]


def mean(recipe: str, cell: tuple[str, str], value: Value) -> float:
    return statistics.mean(value(recipe, r) for r in RUNS[recipe][cell])


def comparisons(recipes: Iterable[str]) -> list[tuple[str, str, str]]:
    """Recipe, network and base of SAM and its base; once where two recipes have the same runs."""
    found: dict[str, tuple[str, str, str]] = {}
    for recipe in recipes:
        for network in NETWORKS:
            for base in BASES:
                runs = [r for name in (base, f"{base}+sam") for r in RUNS[recipe][network, name]]
                losses = json.dumps([[m["train_loss"] for m in r.metrics] for r in runs])
                found.setdefault(losses, (recipe, network, base))
    return list(found.values())


def differences(value: Value, recipes: Iterable[str] = RECIPES) -> list[float]:
    """SAM's mean over the seeds, less its base's, of each comparison."""
    return [
        mean(recipe, (network, f"{base}+sam"), value) - mean(recipe, (network, base), value)
        for recipe, network, base in comparisons(recipes)
    ]


def lower(value: Value, recipes: Iterable[str] = RECIPES) -> str:
    return IN_WORDS[sum(x < 0 for x in differences(value, recipes))]


def over(a: Value, b: Value, recipes: Iterable[str] = RECIPES, optimizers: str = "") -> list[float]:
    """a / b of each cell's means; of the optimizers whose names match."""
    return [
        mean(recipe, cell, a) / mean(recipe, cell, b)
        for recipe in recipes
        for cell in RUNS[recipe]
        if re.search(optimizers, cell[1])
    ]


def span(values: Iterable[float], digits: int = 2) -> str:
    values = list(values)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def where_adam_beats_sgd(recipes: Iterable[str], around: str) -> list[tuple[str, str]]:
    accuracy = last("test_acc")
    return [
        (recipe, network)
        for recipe in recipes
        for network in NETWORKS
        if mean(recipe, (network, "adam" + around), accuracy) > mean(recipe, (network, "sgd" + around), accuracy)
    ]


def adam_beats_sgd(recipes: Iterable[str] = RECIPES) -> str:
    return IN_WORDS[len(where_adam_beats_sgd(recipes, "+sam"))]


def intervals_without_0() -> tuple[str, set[str]]:
    rows = [
        (cell[1], row) for recipe in RECIPES for cell, row in cells_of(SWEEPS[recipe]).items() if row["interval_low"]
    ]
    found = [name for name, row in rows if float(row["interval_low"]) > 0 or float(row["interval_high"]) < 0]
    return IN_WORDS[len(found)], set(found)


def by_rho(recipe: str) -> dict[tuple[str, str], dict[float, float]]:
    return {cell: study.ratios(HELD[recipe], runs) for cell, runs in RUNS[recipe].items()}


SAM_GEOMETRY = ("paper-text", "fair")


def realised(at: float, recipes: Iterable[str]) -> list[float]:
    return [ratios[at] for recipe in recipes for ratios in by_rho(recipe).values()]


def at_equal_loss(
    *pairs: tuple[str, str], recipes: Iterable[str] = RECIPES, networks: Iterable[str] = tuple(NETWORKS)
) -> list[float]:
    found = []
    for recipe in recipes:
        for network in networks:
            for one, other in pairs:
                cells = [{r.settings["seed"]: r for r in RUNS[recipe][network, name]} for name in (one, other)]
                found += [study.at_equal_loss(cells[0][seed], cells[1][seed])[1] for seed in cells[0]]
    return found


def trend(
    optimizer: str, recipes: Iterable[str] = RECIPES, networks: Iterable[str] = tuple(NETWORKS)
) -> dict[str, list[float]]:
    """Recorded sharpness over the first epoch's: the lowest and the last of each run."""
    runs = [r for recipe in recipes for network in networks for r in RUNS[recipe][network, optimizer]]
    curves = [[x / r.sharpness(1)[0] for x in r.sharpness(1)] for r in runs]
    return {"lowest": [min(c) for c in curves], "last": [c[-1] for c in curves]}


LARGE = cells_of("large-fair")


class Large:
    """One network of the table with 10,000 images."""

    def __init__(self, network: str) -> None:
        self.network = network
        self.rows = {optimizer: row for (name, optimizer), row in LARGE.items() if name == network}

    def gain(self, optimizer: str) -> float:
        return float(self.rows[optimizer]["sam_minus_base"])

    def excludes_0(self) -> tuple[set[str], set[str]]:
        """What gains, and what loses, with an interval that excludes 0."""
        rows = {optimizer: row for optimizer, row in self.rows.items() if row["interval_low"]}
        gains = {optimizer for optimizer, row in rows.items() if float(row["interval_low"]) > 0}
        return gains, {optimizer for optimizer, row in rows.items() if float(row["interval_high"]) < 0}

    def mean(self, optimizer: str, key: str) -> float:
        return mean("large", (self.network, optimizer), last(key))

    def ahead(self, base: str) -> float:
        """Momentum-SAM's held-out accuracy in the last epoch but one, less the base's, in percentage points."""
        plain, msam = (
            mean("large", (self.network, name), lambda _, r: 100 * r.metrics[-2]["val_acc"])
            for name in (base, f"{base}+msam")
        )
        return msam - plain

    def reach(self, optimizer: str) -> float | None:
        return study.reach(study.ratios(HELD["large"], RUNS["large"][self.network, optimizer]))

    def equal(self, *pairs: tuple[str, str]) -> str:
        return span(at_equal_loss(*pairs, recipes=["large"], networks=[self.network]))

    def rise(self, optimizer: str) -> str:
        return span(trend(optimizer, ["large"], [self.network])["last"])

    def loss_at(self, base: str, rho: float) -> float:
        """What SAM at ``rho`` loses to the plain base in the grids, in percentage points of the held-out images."""
        grid = [r for r in READ["large"] if r.in_grid]
        plain = max(r.metrics[-1]["test_acc"] for r in grid if r.cell == (self.network, base))
        [sam] = [r for r in grid if r.cell == (self.network, f"{base}+sam") and r.settings["rho"] == rho]
        return 100 * (plain - sam.metrics[-1]["test_acc"])


VGG16, RESNET18 = Large("vgg16"), Large("resnet18")
BOTH = (VGG16, RESNET18)


def of_both(value: Callable[[Large, str], float], digits: int = 1) -> str:
    """From the lowest to the highest of both networks and both bases."""
    return span((value(net, base) for net in BOTH for base in BASES), digits)


def lowered(key: str) -> str:
    """In how many of both networks and both bases Momentum-SAM has the lower mean."""
    return IN_WORDS[sum(net.mean(f"{base}+msam", key) < net.mean(base, key) for net in BOTH for base in BASES)]


MSAM_GAINS = f"{of_both(lambda net, base: net.gain(f'{base}+msam'))} points"


def on_all_images(name: str, value: Value) -> float:
    return mean("all", ("vgg16", name), value)


def more_images() -> str:
    """What the test accuracy of Adam, SAM and Momentum-SAM gains by all images over 10,000, in percentage points."""
    accuracy = last("test_acc")
    return span((100 * (mean("all", cell, accuracy) - mean("large", cell, accuracy)) for cell in RUNS["all"]), 0)


def of_all_images(value: Value) -> str:
    """In %, from the lowest to the highest mean of Adam, SAM and Momentum-SAM."""
    return span((100 * on_all_images(name, value) for _, name in RUNS["all"]), 1)


READ_NOISE = {dataset: read_runs(RESULTS / f"noise-{dataset}") for dataset in ("digits", "cifar10")}
NOISE = {dataset: noise.cells_of(runs) for dataset, runs in READ_NOISE.items()}
GRIDS = {dataset: noise.grids_of(runs) for dataset, runs in READ_NOISE.items()}


def ties(dataset: str) -> dict[tuple[str, int, str], list[float]]:
    """Of each grid in which several values have the highest validation accuracy: these."""
    found = {}
    for key, grid in GRIDS[dataset].items():
        scores = {value: r.metrics[-1]["val_acc"] for value, r in grid.items() if not r.why_not}
        found[key] = [value for value, score in scores.items() if score == max(scores.values())]
    return {key: best for key, best in found.items() if len(best) > 1}


TIES = ties("digits")
CIFAR10 = {key: cell for key, cell in NOISE["cifar10"].items() if key[1] > 0}  # with wrong labels
LATE = [*(("cifar10", *key[:2]) for key in CIFAR10 if key[2] == "late"), ("digits", "sgd", 60)]


def wrong_labels(dataset: str, base: str, part: int, method: str, at: str = "last") -> tuple[float, float]:
    """The interval of what ``method`` adds to the test accuracy, after the last epoch or in the best one."""
    plain, other = (NOISE[dataset][base, part, name] for name in ("base", method))
    if at == "best":
        return noise.interval(plain.best(), other.best())
    return noise.interval(plain.last("test_acc"), other.last("test_acc"))


def size(dataset: str, base: str, part: int, method: str, at: str = "last") -> str:
    """Of a gain or a loss whose interval excludes 0."""
    low, high = wrong_labels(dataset, base, part, method, at)
    assert low * high > 0
    return span((abs(low), abs(high)), 1)


def above_early_stopping(base: str, part: int, method: str = "late") -> tuple[float, float]:
    """The interval of the method's last epoch less the base's best one: CIFAR-10."""
    plain, other = (NOISE["cifar10"][base, part, name] for name in ("base", method))
    return noise.interval(plain.best(), other.last("test_acc"))


def on_cifar10(base: str, part: int, method: str, key: str, epoch: int = -1) -> float:
    """The mean in %."""
    return 100 * statistics.mean(r.metrics[epoch][key] for r in NOISE["cifar10"][base, part, method].runs.values())


def of_both_bases(key: str) -> str:
    """Without wrong labels, the means of Adam and SGD."""
    return span((on_cifar10(base, 0, "base", key) for base in ("adam", "sgd")), 0)


of_sgd = partial(on_cifar10, "sgd")
MEMORISING = ("sgd", 40), ("adam", 20)  # where the base memorises most


def memorised(method: str) -> str:
    return " and ".join(f"{on_cifar10(*case, method, 'memorised'):.0f}" for case in MEMORISING)


def unlearning() -> list[str]:
    """The memorised shares before the first epoch of the second half, with SAM, and after it."""
    return [f"{on_cifar10(*case, 'late', 'memorised', epoch):.0f}" for case in MEMORISING for epoch in (14, 15)]


def chosen_rhos(method: str) -> str:
    """From the lowest to the highest: CIFAR-10."""
    rhos = {r.settings["rho"] for (*_, name), c in CIFAR10.items() if name == method for r in c.runs.values()}
    return f"{min(rhos):g} to {max(rhos):g}"


def passes(name: str) -> str:
    """The time of a training step over that of one forward and backward pass."""
    [resnet18] = [cell for cell in read("bench/train.json")["networks"] if cell["arch"] == "resnet18"]
    return f"{ratio(resnet18, name):.1f}"


[DEMO_MEMORISED] = re.findall(r"gives back (\d+)% of the wrong labels", (RESULTS / "demo" / "demo.md").read_text())


def stopped(method: str, base: str = "sgd", part: int = 40) -> str:
    """The test accuracy in the best epoch by validation: CIFAR-10."""
    return f"{100 * statistics.mean(NOISE['cifar10'][base, part, method].best().values()):.1f} %"


def memorised_more(method: str) -> str:
    """By how many points than SGD alone: CIFAR-10, 40 % wrong."""
    plain, other = (NOISE["cifar10"]["sgd", 40, name].last("memorised") for name in ("base", method))
    return span(noise.interval(plain, other), 1)


def hours(recipe: str) -> str:
    return f"{sum(m['seconds'] for r in READ[recipe] for m in r.metrics) / 3600:.1f}"


SGD_STOPPED, MSAM_STOPPED, ADAM_STOPPED = stopped("base"), stopped("msam"), stopped("base", "adam", 20)
LATE_TIME = noise.time_ratio(*(NOISE["cifar10"]["sgd", 40, method].seconds() for method in ("base", "late")))


ALL = IN_WORDS[len(comparisons(RECIPES))]
RHOS = {
    method: [
        r.settings["rho"] for (_, name), runs in RUNS["large"].items() for r in runs if name.endswith("+" + method)
    ]
    for method in ("sam", "msam")
}
FLATTEST = {
    kind: mean("large", ("resnet18", "adam+msam"), measured(kind)) / mean("large", ("resnet18", "adam"), measured(kind))
    for kind in KINDS
}
WITH_SAM = ("sgd", "sgd+sam"), ("adam", "adam+sam")
EQUAL = [
    ratio
    for recipe, network, base in comparisons(RECIPES)
    for ratio in at_equal_loss((base, f"{base}+sam"), recipes=[recipe], networks=[network])
]
CLAIMS = {
    "docs/reproduction.md": [
        f"rho is {RUNS['all']['vgg16', 'adam+sam'][0].settings['rho']:g} for SAM and "
        f"{RUNS['all']['vgg16', 'adam+msam'][0].settings['rho']:g} for Momentum-SAM, as chosen with 10,000 images",
        f"on average {on_all_images('adam+sam', recorded):.3f} against {on_all_images('adam', recorded):.3f}",
        f"the networks are {more_images()} points more accurate than with 10,000 images",
        f"for {of_all_images(last('train_acc'))} % of their training images in the last epoch",
        f"training records in the last epoch is lower with SAM in all {lower(recorded)} comparisons",
        f"Adam + SAM is more accurate than SGD + SAM in all {adam_beats_sgd()}",
        f"{lower(last('test_acc')).capitalize()} of the {ALL} differences are negative",
        f"and {intervals_without_0()[0]} of their intervals exclude 0, all of SGD",
        f"SAM lowers the test loss in {lower(last('test_loss'))} of {ALL}, all",
        f"all {lower(last('test_loss'), ['fair'])} of `fair` among them",
        f"higher training loss, in all {IN_WORDS[sum(x > 0 for x in differences(last('train_loss')))]} comparisons",
        f"**Momentum-SAM is above its base** by {MSAM_GAINS} in all four comparisons",
        f"lower with SAM in {lower(recorded, ['large'])} of the four comparisons, and Adam + SAM is more accurate than "
        f"SGD + SAM for {adam_beats_sgd(['large'])} of the two",
        f"in epoch 29, before it, by {of_both(Large.ahead)} points",
        f"`paper-text`'s 24 runs took {hours('paper-text')} hours, `paper-code`'s 24 took {hours('paper-code')}, and "
        f"`fair`'s 48 took {hours('fair')}",
        f"It lowers the test loss in all {lowered('test_loss')}, and the training loss in {lowered('train_loss')}.",
        f"It is {of_both(lambda net, base: -net.gain(f'{base}+sam'))} points below its base in all four comparisons",
        f"loses {of_both(lambda net, base: net.loss_at(base, 0.05), 0)} points of the held-out images",
        f"for {of_both(lambda net, base: 100 * net.mean(base, 'train_acc'), 0)} % of their",
    ],
    "README.md": [
        f"ResNet-18 of width 16 takes the time of {passes('FusedSAM')} passes with FusedSAM and with "
        f"pytorch_optimizer, and of {passes('FusedMSAM')} with FusedMSAM (AMD EPYC",
        f"Adam at learning rate {demo.SETTING['lr']:g}, SAM at rho {demo.RHO:g}; one run",
        f"is {MSAM_GAINS} above its base in all four comparisons with 10,000 images",
        f"the sharpness that training records is lower with SAM in all {lower(recorded)} comparisons with 1,000",
        f"and in {lower(recorded, ['large'])} of four with 10,000",
        f"SGD + SAM in all {adam_beats_sgd()} pairs with 1,000 and {adam_beats_sgd(['large'])} of two with 10,000",
        f"wrong Adam ends at {on_cifar10('adam', 20, 'base', 'test_acc'):.1f} % ({ADAM_STOPPED} in its best epoch), "
        f"and with SAM in the second half at {on_cifar10('adam', 20, 'late', 'test_acc'):.1f} %",
        f"chooses a rho of {min(RHOS['sam'])} to {max(RHOS['sam'])}",
        f"SGD ends at {of_sgd(40, 'base', 'test_acc'):.1f} % accuracy on the clean test images, with",
        f"{of_sgd(40, 'base', 'memorised'):.0f} % of the wrong labels memorised. With SAM in the second half",
        f"in {float(LATE_TIME):.1f} times the processor time, it ends at {of_sgd(40, 'late', 'test_acc'):.1f} %, with",
        f"{of_sgd(40, 'late', 'memorised'):.0f} % memorised. Stopped in their best epochs by validation, SGD has "
        f"{SGD_STOPPED} and Momentum-SAM {MSAM_STOPPED}.",
    ],
    "docs/choosing.md": [
        f"here in all {IN_WORDS[sum(x > 0 for x in differences(last('train_loss')))]} comparisons",
        f"most**, {size('digits', 'adam', 60, 'long')} points in SAM's time",
        f"at a learning rate of {demo.SETTING['lr']:g} plain Adam memorises {DEMO_MEMORISED} %, and SAM gains much",
        f"SAM in the second half gains {size('digits', 'adam', 60, 'late')}, and SAM from the start",
        f"from the start {size('digits', 'adam', 60, 'sam')}.",
        f"In {IN_WORDS[sum(key[2] == 'decay' for key in TIES)]} of the eight columns several values are equally",
        f"In {len(TIES)} of the {len(GRIDS['digits'])} several values share the highest",
        f"Momentum-SAM loses {size('digits', 'adam', 60, 'msam')}.",
        f"SAM in the second half gains {size('digits', 'sgd', 60, 'late')} points, ASAM",
        f"ASAM {size('digits', 'sgd', 60, 'asam')}, an ascent on a quarter of the batch",
        f"of the batch {size('digits', 'sgd', 60, 'part')}.",
        f"no method gains but twice the epochs, {size('digits', 'sgd', 20, 'long')} with 20 %.",
        f"{size('cifar10', 'sgd', 40, 'late')} points around SGD with 40 % wrong, and "
        f"{size('cifar10', 'adam', 20, 'late')} around Adam with 20 %",
        f"the bases give back {memorised('base')} % of the wrong labels",
        "this share falls from {} to {} % and from {} to {} %.".format(*unlearning()),
        f"It ends at {memorised('late')} %.",
        f"{size('cifar10', 'adam', 40, 'late')} points around Adam with 40 % wrong, where the chosen",
        f"larger and Adam memorises {on_cifar10('adam', 40, 'base', 'memorised'):.0f} %",
        f"{of_sgd(20, 'late', 'test_acc') - of_sgd(20, 'base', 'test_acc'):.1f} points on average, with an "
        f"interval that contains 0. It memorises {of_sgd(20, 'late', 'memorised'):.0f} % of the wrong labels, and "
        f"SGD alone {of_sgd(20, 'base', 'memorised'):.0f} %",
        f"best epoch by validation has {SGD_STOPPED}. SAM",
        f"without stopping, ends {span(above_early_stopping('sgd', 40), 1)} points above that, and with Adam and 20 % "
        f"wrong {span(above_early_stopping('adam', 20), 1)} above",
        f"{size('cifar10', 'adam', 20, 'sam')} points around Adam with 20 % wrong, after the last",
        f"images choose {chosen_rhos('sam')}, and for the second half {chosen_rhos('late')}.",
        f"{size('cifar10', 'adam', 20, 'msam')} points after the last epoch, with "
        f"{on_cifar10('adam', 20, 'msam', 'memorised'):.0f} % of the wrong labels memorised",
        f"the bases end with {of_both_bases('train_acc')} % accuracy on their training images",
        f"{size('cifar10', 'sgd', 0, 'late')} points around SGD, over {of_sgd(0, 'base', 'test_acc'):.1f} %",
        f"{size('cifar10', 'adam', 0, 'late')} around Adam, over {on_cifar10('adam', 0, 'base', 'test_acc'):.1f} %",
        f"ends {span(above_early_stopping('adam', 0), 1)} points above Adam stopped in its best epoch",
        f"best epoch Momentum-SAM around SGD loses {size('cifar10', 'sgd', 0, 'msam', 'best')}.",
        f"best epoch it is {size('cifar10', 'sgd', 40, 'msam', 'best')} points above the base's best",
        f"Momentum-SAM is {MSAM_GAINS} above its base [with 10,000]",
        f"Momentum-SAM gains {size('digits', 'adam', 20, 'msam', 'best')} points with 20 % wrong",
        f"ASAM loses {size('digits', 'sgd', 40, 'asam')}.",
        f"the base gains {size('digits', 'sgd', 40, 'decay', 'best')} by the weight decay that is chosen, and "
        f"{size('digits', 'sgd', 40, 'long', 'best')} by twice",
        f"With SGD and 40 % wrong it memorises {memorised_more('msam')} points more than the base",
        f"above the base's best, at {MSAM_STOPPED}: about as much",
    ],
    "docs/sharpness.md": [
        f"the realised and the average sharpness in all {lower(measured('realised'))} comparisons",
        f"and the first-order sharpness over the 512 images in {lower(measured('first_order'))}",
        f"is {span(over(recorded, measured('first_order')), 1)} times the first-order sharpness",
        f"realised rise is {span(realised(0.05, SAM_GEOMETRY))} times the first-order value",
        f"below 1 in {sum(x < 1 for x in EQUAL)} of {len(EQUAL)} pairs of runs ({span(x for x in EQUAL if x < 1)}; the "
        f"other is {max(EQUAL):.2f})",
        f"at rho 2 it is {span(realised(2.0, ['paper-code']), 1)}",
        f"plain SGD's falls at first, to {span(trend('sgd')['lowest'])} times that of the first",
        f"and ends at {span(trend('sgd')['last'])} times that of the first",
        f"recorded sharpness is {VGG16.equal(('sgd', 'adam'))} times SGD's for VGG16, and "
        f"{RESNET18.equal(('sgd', 'adam'))} times for ResNet-18",
        f"SGD's ends at {span(trend('sgd', ['large'])['last'])} times the first epoch's",
        f"Adam's ends at {VGG16.rise('adam')} times for VGG16, but at {RESNET18.rise('adam')} times for ResNet-18",
        f"at {span(FLATTEST.values())} times plain Adam's values",
        f"SAM's sharpness is {span(at_equal_loss(*WITH_SAM, recipes=['large']))} times its base's",
        f"then rises, to {min(trend('adam')['last']):.2f} to {max(trend('adam')['last']):.1f} times the first epoch's",
    ],
}


@pytest.mark.parametrize(("page", "claim"), [(page, claim) for page, claims in CLAIMS.items() for claim in claims])
def test_claim(page, claim):
    assert claim in " ".join((ROOT / page).read_text().split())


def test_whole_training_steps_take_the_same_time():
    """ "the time of 2.0 passes with FusedSAM and with pytorch_optimizer"."""
    assert passes("pytorch_optimizer SAM") == passes("pytorch_optimizer SAM, fused=True") == passes("FusedSAM")


def test_how_far_the_proposition_holds_with_10_000_images():
    reaches = [[net.reach(name) for name in ("sgd", "sgd+sam", "adam", "adam+sam")] for net in BOTH]
    assert reaches == [[0.1, 0.1, 0.05, 0.02], [0.05, 0.1, 0.02, 0.02]]


def test_what_excludes_0_with_10_000_images():
    assert VGG16.excludes_0() == ({"adam+msam"}, set())
    assert RESNET18.excludes_0() == (set(), {"sgd+sam"})


def test_the_exception_with_10_000_images():
    """ "ResNet-18 ends with a higher training loss and the lowest test loss of all", around Adam."""
    assert RESNET18.mean("adam+msam", "train_loss") > RESNET18.mean("adam", "train_loss")
    losses = {(net.network, name): net.mean(name, "test_loss") for net in BOTH for name in net.rows}
    assert min(losses, key=lambda cell: losses[cell]) == ("resnet18", "adam+msam")
    for kind in KINDS:
        flat = {cell: mean("large", cell, measured(kind)) for cell in RUNS["large"]}
        assert min(flat, key=lambda cell: flat[cell]) == ("resnet18", "adam+msam")


def test_the_chosen_rhos_with_10_000_images():
    """ "a tenth of the usual 0.05 or less"; of Momentum-SAM, "0.05 to 0.5"."""
    assert max(RHOS["sam"]) == 0.005
    assert (min(RHOS["msam"]), max(RHOS["msam"])) == (0.05, 0.5)


@pytest.mark.parametrize("recipes", [RECIPES, ["large"]], ids=["1,000", "10,000"])
def test_where_adam_beats_sgd(recipes):
    """With SAM and without it in the same pairs; ResNet-18 with 10,000 images."""
    found = where_adam_beats_sgd(recipes, "+sam")
    assert where_adam_beats_sgd(recipes, "") == found
    assert recipes == RECIPES or found == [("large", "resnet18")]


def test_the_choices_of_rho():
    """ "In three of the four grids the plain base is better than SAM at every rho, and in the fourth ... as good"."""
    tried = {
        (net, base): [r.settings["rho"] for r in READ["large"] if r.in_grid and r.cell == (net.network, f"{base}+sam")]
        for net in BOTH
        for base in BASES
    }
    assert RUNS["large"]["resnet18", "sgd+sam"][0].settings["rho"] == min(tried[RESNET18, "sgd"]) == 0.0005
    least = {(net.network, base): min(net.loss_at(base, rho) for rho in rhos) for (net, base), rhos in tried.items()}
    assert least.pop(("vgg16", "adam")) == 0
    assert len(least) == 3
    assert min(least.values()) > 0


def test_the_three_measures_do_not_agree_with_10_000_images():
    optimizers = [name for base in WITH_SAM for name in base]
    for network in NETWORKS:
        ends = set()
        for kind in KINDS:
            values = {name: mean("large", (network, name), measured(kind)) for name in optimizers}
            ends.add((min(values, key=values.__getitem__), max(values, key=values.__getitem__)))
        assert len(ends) > 1
    lowered = [lower(measured(kind), ["large"]) for kind in ("first_order", "realised", "average")]
    assert lowered == ["four", "three", "three"]


def test_false_alarms_of_sharpness():
    """ "In 26 of these sharpness has fallen to less than a fifth of the first epoch's"; "in the other six ..."."""
    fallen, before = [], []
    for (network, base, wrong), runs in memorising.cells_of(read_runs(RESULTS / "memorising")).items():
        for r in runs:
            if wrong == 0 and (epoch := memorising.signals(r)["sharpness"]):
                values = r.sharpness(1.0)
                low = min(values[:epoch]) / values[0]
                (fallen if low < 1 / 5 else before).append((network, base, epoch, low))
    assert (len(fallen), len(before)) == (26, 6)
    assert {x[:2] for x in before} == {("vgg16", "sgd")}
    assert {x[2] for x in before} == {2, 3}
    assert min(x[3] for x in before) > 0.8


def test_all_images():
    """Three seeds on one machine; "no gain is shown"; the recorded sharpness is lower with SAM for each of them."""
    rows = {optimizer: row for (_, optimizer), row in cells_of("all-fair").items()}
    assert [(name, row["n"]) for name, row in rows.items()] == [("adam", "3"), ("adam+sam", "3"), ("adam+msam", "3")]
    for name in ("adam+sam", "adam+msam"):
        assert float(rows[name]["interval_low"]) < 0 < float(rows[name]["interval_high"])
    plain, sam = ({r.settings["seed"]: r for r in RUNS["all"]["vgg16", name]} for name in ("adam", "adam+sam"))
    assert all(recorded("all", sam[seed]) < recorded("all", plain[seed]) for seed in plain)
    [of_plain], [of_sam] = ({len(r.metrics) for r in runs.values()} for runs in (plain, sam))
    assert of_plain == of_sam == 30
    assert {r.environment["cpu"] for runs in RUNS["all"].values() for r in runs} == {"AMD EPYC"}


def test_the_machines_of_the_runs_with_10_000_images():
    def cpus(network: str, in_grid: bool) -> list[str]:
        runs = [r for r in READ["large"] if r.settings["arch"] == network and r.in_grid == in_grid]
        return [r.environment["cpu"] for r in runs]

    assert {*cpus("resnet18", True), *cpus("resnet18", False)} == {"AMD EPYC"}
    assert not any("AMD" in cpu for cpu in cpus("vgg16", False))
    assert (cpus("vgg16", True).count("AMD EPYC"), len(cpus("vgg16", True))) == (17, 28)


def test_weight_decays_that_are_chosen():
    """ "the base has 0.0005, which the grid does not hold"."""
    grids = [grid for (*_, method), grid in GRIDS["digits"].items() if method == "decay"]
    assert len(grids) == 8
    assert not any(0.0005 in grid for grid in grids)
    plain = [cell for (_, _, method), cell in NOISE["digits"].items() if method == "base"]
    assert {r.settings["weight_decay"] for cell in plain for r in cell.runs.values()} == {0.0005}


def test_the_learning_rate_that_cuts_the_base_short():
    """ "The chosen learning rate, 1e-05, is the lowest that was tried, and 3e-05 is as good": digits, Adam, 60 %."""
    assert min(GRIDS["digits"]["adam", 60, "base"]) == 1e-5
    assert TIES["adam", 60, "base"] == [1e-5, 3e-5]
    assert {r.settings["lr"] for r in NOISE["digits"]["adam", 60, "long"].runs.values()} == {1e-5}


def test_what_excludes_0_with_wrong_labels():
    gains = {key: wrong_labels("cifar10", *key) for key in CIFAR10 if key[2] != "base"}
    with_adam = {("adam", 20, method) for method in ("sam", "late", "msam")}
    assert {key for key, (low, _) in gains.items() if low > 0} == {
        *with_adam,
        ("sgd", 40, "late"),
        ("adam", 40, "late"),
    }
    assert {key for key, (_, high) in gains.items() if high < 0} == set()
    assert len(gains) == 12


def test_what_gains_over_stopping_early_with_wrong_labels():
    for key in CIFAR10:
        low, _ = above_early_stopping(*key)
        assert (low > 0) == (key in {("sgd", 40, "late"), ("adam", 20, "late")}), key


def test_what_is_not_certain_without_wrong_labels():
    uncertain = [wrong_labels("cifar10", base, 0, method) for base in ("sgd", "adam") for method in ("sam", "msam")]
    for low, high in (*uncertain, above_early_stopping("sgd", 0)):
        assert low < 0 < high


def test_late_sam_gains_most_without_wrong_labels_too():
    gains = {
        (base, part): statistics.mean(wrong_labels("cifar10", base, part, "late"))
        for base in ("sgd", "adam")
        for part in (0, 20, 40)
    }
    assert set(sorted(gains, key=gains.__getitem__)[-2:]) == set(MEMORISING)  # "the two best of six cases"
    for base in ("sgd", "adam"):
        means = {
            key[2]: statistics.mean(cell.last("test_acc").values())
            for key, cell in NOISE["cifar10"].items()
            if key[:2] == (base, 0)
        }
        assert max(means, key=means.__getitem__) == "late"


def test_the_machines_of_the_runs_on_cifar10():
    def cpus(in_grid: bool, xeon: bool) -> set[str]:
        return {
            r.environment["cpu"].split()[0]
            for r in READ_NOISE["cifar10"]
            if r.in_grid == in_grid
            and (in_grid or ((r.settings["label_noise"] == 0.2 or r.name.startswith("sgd-0-")) == xeon))
        }

    assert (cpus(False, True), cpus(False, False)) == ({"Intel(R)"}, {"AMD"})
    assert cpus(True, True) == {"Intel(R)", "AMD"}


def test_in_how_many_cases_late_sam_gains():
    """ "over all 14 cases, its interval after the last epoch is above 0 in seven"."""
    cases = [(dataset, *key[:2]) for dataset in NOISE for key in NOISE[dataset] if key[2] == "late"]
    assert (len(cases), sum(wrong_labels(*case, "late")[0] > 0 for case in cases)) == (14, 7)


def test_what_sgd_gains_with_few_wrong_labels():
    """ "no method gains but twice the epochs, ... with 20 %"."""
    methods = {key for key in NOISE["digits"] if key[0] == "sgd" and key[1] <= 20 and key[2] != "base"}
    gains = {key: wrong_labels("digits", *key) for key in methods}
    assert {key for key, (low, _) in gains.items() if low > 0} == {("sgd", 20, "long")}
    assert not [key for key, (_, high) in gains.items() if high < 0]


def test_what_late_sam_gains_in_the_best_epoch():
    """ "two of the five intervals are above 0"."""
    lows = [wrong_labels(*case, "late", "best")[0] for case in LATE]
    assert (len(lows), sum(low > 0 for low in lows)) == (5, 2)


def test_what_late_sam_costs():
    """ "in 1.35 to 1.55 times the base's time"."""
    times = [
        noise.time_ratio(*(NOISE[dataset][base, part, method].seconds() for method in ("base", "late")))
        for dataset, base, part in LATE
    ]
    assert (min(times), max(times)) == ("1.35", "1.55")


def test_momentum_sam_s_best_epoch_with_wrong_labels():
    """ "in a third of the epochs" """
    runs = NOISE["cifar10"]["sgd", 40, "msam"].runs.values()
    best = [max(r.metrics, key=lambda m: m["val_acc"])["epoch"] for r in runs]
    assert sorted(best) == [10, 11, 11]
    assert {len(r.metrics) for r in runs} == {30}


def test_where_late_sam_gains_most():
    """In all of CIFAR-10 with wrong labels, and in one part of digits."""
    assert len(LATE) == 5
    for dataset, base, part in LATE:
        cells = {key[2]: cell for key, cell in NOISE[dataset].items() if key[:2] == (base, part)}
        means = {method: statistics.mean(cell.last("test_acc").values()) for method, cell in cells.items()}
        assert max(means, key=lambda method: means[method]) == "late"


def test_momentum_sam_may_not_train_at_the_chosen_rho():
    runs = NOISE["cifar10"]["sgd", 20, "msam"].runs
    assert {r.settings["rho"] for r in runs.values()} == {0.3}
    assert [seed for seed, r in runs.items() if max(m["test_acc"] for m in r.metrics) < 0.11] == [1]


def test_a_large_rho_from_the_start_does_not_train():
    grid = [r for r in READ_NOISE["cifar10"] if r.in_grid and "-sam-" in r.name and r.settings["label_noise"] > 0]
    trained = {base: {r.settings["rho"] for r in grid if r.settings["base"] == base} for base in ("sgd", "adam")}
    for r in grid:
        if r.metrics[-1]["test_acc"] < 0.11:  # one class for all images
            trained[r.settings["base"]].discard(r.settings["rho"])
    assert (max(trained["sgd"]), max(trained["adam"])) == (0.03, 0.1)


def test_the_intervals_are_of_sgd():
    assert intervals_without_0()[1] == {"sgd+sam"}


def test_both_measures_agree():
    """ "the realised and the average sharpness": of one number."""
    assert lower(measured("realised")) == lower(measured("average"))


def test_the_average_is_far_smaller():
    ratios = [1 / x for x in over(measured("average"), measured("first_order"), SAM_GEOMETRY)]
    text = (ROOT / "docs" / "sharpness.md").read_text()
    assert f"1/{min(ratios):.0f} to 1/{max(ratios):.0f} of" in text
