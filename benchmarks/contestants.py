"""Who takes part in `attacks.py`: for each attack Feint's function and every peer that has it.

A maker takes the model and the budget and gives `run(x, y) -> x_adv`. Settings are the same for all
of a row of the table, as far as a peer allows.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import feint.attacks

__all__ = ["CASES", "PEERS", "Budget", "Case"]

PEERS = {
    "foolbox": "foolbox",
    "torchattacks": "torchattacks",
    "art": "adversarial-robustness-toolbox",
    "adv_lib": "adv-lib",
    "pyautoattack": "pyautoattack",
}
INF = float("inf")
Run = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """eps for each norm, in image units."""

    linf: float = 8 / 255
    l2: float = 0.5
    l1: float = 12.0


Make = Callable[[nn.Module, Budget], Run]


def with_budget(kwargs: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """Numbers that are written as a function of the budget, such as `lambda b: b.linf / 4`."""
    return {k: v(budget) if isinstance(v, types.FunctionType) else v for k, v in kwargs.items()}


def eps(norm: str, share: float = 1.0) -> Callable[[Budget], float]:
    return lambda budget: share * getattr(budget, norm)


def feint_(name: str, **kwargs: Any) -> Make:
    attack = getattr(feint.attacks, name)

    def make(model: nn.Module, budget: Budget) -> Run:
        settings = with_budget(kwargs, budget)
        return lambda x, y: attack(model, x, y, **settings)

    return make


def next_class(model: nn.Module, budget: Budget) -> Run:
    """JSMA towards the class after the true one."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        return feint.attacks.jsma(model, x, (y + 1) % classes, targeted=True, gamma=0.145)

    return run


def foolbox_(name: str, radius: Callable[[Budget], float] | None = None, **kwargs: Any) -> Make:
    def make(model: nn.Module, budget: Budget) -> Run:
        import foolbox as fb

        wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attack = getattr(fb.attacks, name)(**with_budget(kwargs, budget))
        epsilons = None if radius is None else radius(budget)

        def run(x: Tensor, y: Tensor) -> Tensor:
            goal = fb.criteria.Misclassification(y)
            return attack(wrapped, x, goal, epsilons=epsilons)[1]

        return run

    return make


def torchattacks_(name: str, **kwargs: Any) -> Make:
    def make(model: nn.Module, budget: Budget) -> Run:
        import torchattacks

        return getattr(torchattacks, name)(model, **with_budget(kwargs, budget))

    return make


class InFloat32(nn.Module):
    """A model that takes images of any type: ART's HopSkipJump asks about float64 ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits."""
        return self.model(x.float())


def art_(name: str, **kwargs: Any) -> Make:
    def make(model: nn.Module, budget: Budget) -> Run:
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier

        def run(x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                classes = model(x[:1]).shape[1]
            classifier = PyTorchClassifier(
                InFloat32(model).eval(), nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes,
                clip_values=(0, 1), device_type="cpu",
            )  # fmt: skip
            attack = getattr(evasion, name)(classifier, **with_budget(kwargs, budget))
            return torch.from_numpy(attack.generate(x.numpy(), y.numpy())).to(x.dtype)

        return run

    return make


def adv_lib_(name: str, **kwargs: Any) -> Make:
    def make(model: nn.Module, budget: Budget) -> Run:
        visdom = types.ModuleType("visdom")  # imported by adv-lib, used by nothing here
        visdom.Visdom = object
        sys.modules.setdefault("visdom", visdom)
        import adv_lib.attacks

        attack = getattr(adv_lib.attacks, name)
        settings = with_budget(kwargs, budget)
        return lambda x, y: attack(model, x, y, **settings)

    return make


def original(attacks: tuple[str, ...] | None, norm: str = "linf") -> Make:
    """The authors' AutoAttack, whole or in parts; APGD as in `standard`, with one restart."""

    def make(model: nn.Module, budget: Budget) -> Run:
        from pyautoattack import AutoAttack

        def run(x: Tensor, y: Tensor) -> Tensor:
            suite = AutoAttack(
                model, norm=norm.capitalize(), eps=getattr(budget, norm), seed=0,
                attacks=None if attacks is None else list(attacks),
                version="standard" if attacks is None else "custom",
            )  # fmt: skip
            suite.apgd.n_restarts = 1
            return suite.run_standard_evaluation(x, y, batch_size=len(x))[0]

        return run

    return make


def original_fab(norm: str = "linf") -> Make:
    def make(model: nn.Module, budget: Budget) -> Run:
        from pyautoattack.fab_pt import FABAttack_PT

        walk = FABAttack_PT(
            model, norm=norm.capitalize(), n_restarts=1, n_iter=100, eps=getattr(budget, norm),
            seed=0, verbose=False, device="cpu",
        )  # fmt: skip
        return functools.partial(walk.attack_single_run, is_targeted=False)

    return make


def original_square(queries: int, norm: str = "linf") -> Make:
    def make(model: nn.Module, budget: Budget) -> Run:
        from pyautoattack.square import SquareAttack

        return SquareAttack(
            model, p_init=0.8, n_queries=queries, eps=getattr(budget, norm), norm=norm.capitalize(),
            n_restarts=1, seed=0, verbose=False, device="cpu", resc_schedule=False,
        ).perturb  # fmt: skip

    return make


@dataclass(frozen=True)
class Case:
    """One row group of the table."""

    norm: str
    images: int
    who: dict[str, Make]
    never: dict[str, Any] | None = field(default_factory=dict)
    """For `--overhead`: the attack's name is the case's first word, these its settings."""


LINF, L2 = eps("linf"), eps("l2")
STEP = eps("linf", 0.25)
CW = {"steps": 1000, "initial_const": 1e-3}
EAD = {"steps": 200, "initial_const": 1e-2}
BASE = {"eps": LINF, "alpha": STEP, "steps": 10}
CASES: dict[str, Case] = {
    "fgsm": Case("linf", 128, {
        "feint": feint_("fgsm", eps=LINF),
        "foolbox": foolbox_("LinfFastGradientAttack", LINF),
        "torchattacks": torchattacks_("FGSM", eps=LINF),
        "art": art_("FastGradientMethod", eps=LINF, batch_size=128),
    }, {}),
    "bim": Case("linf", 128, {
        "feint": feint_("bim", eps=LINF, step_size=STEP, steps=10),
        "feint, never": feint_("bim", eps=LINF, step_size=STEP, steps=10, stop="never"),
        "foolbox": foolbox_("LinfBasicIterativeAttack", LINF, abs_stepsize=STEP, steps=10),
        "torchattacks": torchattacks_("BIM", **BASE),
        "art": art_("BasicIterativeMethod", eps=LINF, eps_step=STEP, max_iter=10, batch_size=128,
                    verbose=False),
    }, {"steps": 5}),
    "mi_fgsm": Case("linf", 128, {
        "feint": feint_("mi_fgsm", eps=LINF, step_size=STEP, steps=10),
        "feint, never": feint_("mi_fgsm", eps=LINF, step_size=STEP, steps=10, stop="never"),
        "foolbox": foolbox_(
            "LinfMomentumIterativeFastGradientMethod", LINF, abs_stepsize=STEP, steps=10
        ),
        "torchattacks": torchattacks_("MIFGSM", **BASE),
        "art": art_("MomentumIterativeMethod", eps=LINF, eps_step=STEP, max_iter=10, decay=1.0,
                    batch_size=128, verbose=False),
    }, {"steps": 5}),
    "pgd": Case("linf", 128, {
        "feint": feint_("pgd", eps=LINF, step_size=STEP, steps=40),
        "feint, never": feint_("pgd", eps=LINF, step_size=STEP, steps=40, stop="never"),
        "foolbox": foolbox_("LinfPGD", LINF, abs_stepsize=STEP, steps=40),
        "torchattacks": torchattacks_("PGD", eps=LINF, alpha=STEP, steps=40),
        "art": art_("ProjectedGradientDescent", eps=LINF, eps_step=STEP, max_iter=40,
                    num_random_init=1, batch_size=128, verbose=False),
        "adv_lib": adv_lib_("pgd_linf", ε=LINF, steps=40, absolute_step_size=STEP),
    }, {"steps": 5}),
    "apgd": Case("linf", 64, {
        "feint": feint_("apgd", eps=LINF),
        "feint, never": feint_("apgd", eps=LINF, stop="never"),
        "pyautoattack": original(("apgd-ce",)),
        "torchattacks": torchattacks_("APGD", eps=LINF, steps=100, loss="ce"),
        "adv_lib": adv_lib_("apgd", eps=LINF, norm=INF, n_iter=100, loss_function="ce"),
        "art": art_("AutoProjectedGradientDescent", eps=LINF, eps_step=eps("linf", 2.0),
                    max_iter=100, nb_random_init=1, batch_size=64, loss_type="cross_entropy",
                    verbose=False),
    }, {"steps": 8}),
    "apgd dlr": Case("linf", 64, {
        "feint": feint_("apgd", eps=LINF, loss="dlr"),
        "pyautoattack": original(("apgd-dlr",)),
        "torchattacks": torchattacks_("APGD", eps=LINF, steps=100, loss="dlr"),
        "adv_lib": adv_lib_("apgd", eps=LINF, norm=INF, n_iter=100, loss_function="dlr"),
    }, {"steps": 8, "loss": "dlr"}),
    "apgd targets": Case("linf", 32, {
        "feint": feint_("apgd", eps=LINF, loss="dlr", targets=9),
        "pyautoattack": original(("apgd-t",)),
        "torchattacks": torchattacks_("APGDT", eps=LINF, steps=100),
        "adv_lib": adv_lib_("apgd_targeted", eps=LINF, norm=INF, n_iter=100),
    }, {"steps": 8, "loss": "dlr", "targets": 3}),
    "fab": Case("linf", 32, {
        "feint": feint_("fab"),
        "pyautoattack": original_fab(),
        "torchattacks": torchattacks_("FAB", eps=LINF, steps=100),
        "adv_lib": adv_lib_("fab", norm=INF, n_iter=100),
    }, {"steps": 3, "targets": 3}),
    "fab l2": Case("l2", 32, {
        "feint": feint_("fab", norm="l2"),
        "pyautoattack": original_fab("l2"),
        "adv_lib": adv_lib_("fab", norm=2, n_iter=100),
    }, {"steps": 3, "targets": 3, "norm": "l2"}),
    "square": Case("linf", 32, {
        "feint": feint_("square", eps=LINF, queries=1000, schedule=10_000),
        "pyautoattack": original_square(1000),
        "torchattacks": torchattacks_("Square", eps=LINF, n_queries=1000, resc_schedule=False),
        "art": art_("SquareAttack", eps=LINF, max_iter=1000, batch_size=32, verbose=False),
    }, {"queries": 16}),
    "square l2": Case("l2", 32, {
        "feint": feint_("square", norm="l2", eps=L2, queries=1000, schedule=10_000),
        "pyautoattack": original_square(1000, "l2"),
        "torchattacks": torchattacks_("Square", norm="L2", eps=L2, n_queries=1000,
                                      resc_schedule=False),
        "art": art_("SquareAttack", norm=2, eps=L2, max_iter=1000, batch_size=32, verbose=False),
    }, {"queries": 16, "norm": "l2"}),
    "autoattack": Case("linf", 64, {
        "feint": feint_("autoattack", eps=LINF),
        "pyautoattack": original(None),
        "torchattacks": torchattacks_("AutoAttack", eps=LINF, seed=0),
    }, {"steps": 3, "targets": 2, "queries": 8}),
    "worst_of": Case("linf", 64, {
        "feint": feint_("worst_of", attacks="pgd(steps=40), apgd(loss='dlr')", eps=LINF),
    }, {"attacks": "pgd(steps=4), apgd(steps=4)"}),
    "spsa": Case("linf", 16, {
        "feint": feint_("spsa", eps=LINF, steps=20, samples=128),
        "torchattacks": torchattacks_("SPSA", eps=LINF, nb_iter=20, nb_sample=128,
                                      max_batch_size=64),
    }, {"steps": 2, "samples": 8}),
    "hopskipjump": Case("l2", 8, {
        "feint": feint_("hopskipjump", steps=20),
        "foolbox": foolbox_("HopSkipJumpAttack", steps=20),
        "art": art_("HopSkipJump", max_iter=20, verbose=False),
    }, {"steps": 2, "probes": 16}),
    "spatial": Case("spatial", 32, {
        "feint": feint_("spatial", angle_steps=5),
        "foolbox": foolbox_("SpatialAttack", lambda budget: 0.0),
        "art": art_("SpatialTransformation", max_translation=10.0, num_translations=5,
                    max_rotation=30.0, num_rotations=5, verbose=False),
    }, {"shift_steps": 3, "angle_steps": 3}),
    "transfer": Case("linf", 64, {
        "feint, mi": feint_("transfer", preset="mi", eps=LINF, step_size=STEP, stop="never"),
        "torchattacks, mi": torchattacks_("MIFGSM", **BASE),
        "feint, di": feint_("transfer", preset="di", eps=LINF, step_size=STEP, stop="never"),
        "torchattacks, di": torchattacks_("DIFGSM", **BASE, decay=1.0),
        "feint, ti": feint_("transfer", preset="ti", eps=LINF, step_size=STEP, stop="never"),
        "torchattacks, ti": torchattacks_("TIFGSM", **BASE, decay=1.0, diversity_prob=0.0),
        "feint, si": feint_("transfer", preset="si", eps=LINF, step_size=STEP, stop="never"),
        "torchattacks, si": torchattacks_("SINIFGSM", **BASE),
    }, {"steps": 5}),
    "feature_bpda": Case("linf", 64, {"feint": feint_("feature_bpda", eps=LINF)}, {"steps": 5}),
    "reparameterized": Case("linf", 64, {
        "feint": feint_("reparameterized", eps=LINF, decoder=torch.nn.Sigmoid(),
                        encoder=functools.partial(torch.logit, eps=1e-3), step_size=2.0),
    }, {"steps": 5, "decoder": torch.nn.Sigmoid(),
        "encoder": functools.partial(torch.logit, eps=1e-3)}),
    "one_pixel": Case("l0", 32, {
        "feint": feint_("one_pixel", popsize=40, generations=10),
        "feint, torchattacks' way": feint_("one_pixel", popsize=40, generations=10, levels=None,
                                           strategy="best1bin", scale=(0.5, 1.0), start="uniform"),
        "torchattacks": torchattacks_("OnePixel", popsize=40, steps=10),
        "art": art_("PixelAttack", th=1, es=1, max_iter=10),
    }, {"popsize": 8, "generations": 3}),
    "jsma": Case("l0", 8, {
        "feint": next_class,  # torchattacks' goal, too
        "feint, least likely": feint_("jsma", gamma=0.145),
        "torchattacks": torchattacks_("JSMA", theta=1.0, gamma=0.145),
    }, {"gamma": 0.002}),
    "deepfool": Case("l2", 64, {
        "feint": feint_("deepfool"),
        "feint, 4 classes": feint_("deepfool", classes=4),
        "adv_lib": adv_lib_("df", steps=50),
        "foolbox": foolbox_("L2DeepFoolAttack", steps=50, candidates=10),
        "torchattacks": torchattacks_("DeepFool", steps=50),
        "art": art_("DeepFool", max_iter=50, batch_size=64, verbose=False),
    }, {"steps": 3, "classes": 4}),
    "carlini_wagner": Case("l2", 16, {
        "feint": feint_("carlini_wagner", **CW),
        "foolbox": foolbox_("L2CarliniWagnerAttack", binary_search_steps=9, stepsize=0.01,
                            confidence=0, **CW),
    }, {"steps": 4, "search_steps": 2}),
    "carlini_wagner one c": Case("l2", 16, {
        "feint": feint_("carlini_wagner", search_steps=1, steps=1000, initial_const=1.0),
        "torchattacks": torchattacks_("CW", c=1, kappa=0, steps=1000, lr=0.01),
    }, None),
    "ddn": Case("l2", 64, {
        "feint": feint_("ddn", steps=100),
        "adv_lib": adv_lib_("ddn", steps=100, levels=None),
        "foolbox": foolbox_("DDNAttack", steps=100),
    }, {"steps": 6}),
    "fmn": Case("l2", 64, {
        "feint": feint_("fmn", steps=100),
        "adv_lib": adv_lib_("fmn", steps=100, norm=2),
        "foolbox": foolbox_("L2FMNAttack", steps=100),
    }, {"steps": 6}),
    "ead": Case("l1", 16, {
        "feint": feint_("ead", search_steps=4, **EAD),
        "foolbox": foolbox_("EADAttack", binary_search_steps=4, regularization=0.01,
                            decision_rule="L1", **EAD),
    }, {"steps": 4, "search_steps": 2}),
    "lbfgs": Case("l2", 16, {"feint": feint_("lbfgs")}, {"steps": 4, "search_steps": 2}),
}  # fmt: skip
