"""Runs: what they keep, how they go on, what they refuse."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feint.core.errors import ConfigError, DataError, FeintError, RangeError
from feint.evaluation import Cell, Evaluation, evaluate, health
from feint.evaluation.loop import Progress
from feint.store import (
    Resolver,
    RunSpec,
    StoredRun,
    cache,
    environment,
    open_run,
    prepare,
    resume,
    run,
    run_unit,
    runner,
    units,
)

Make = Callable[..., RunSpec]


@pytest.fixture(scope="module")
def bare(make: Make, tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    """A cheaper whole run: no defense, one attack."""
    patch = pytest.MonkeyPatch()
    patch.setattr(environment, "git", lambda: None)
    directory = tmp_path_factory.mktemp("bare") / "run"
    run(bare_spec(make), directory)
    patch.undo()
    return open_run(directory)


def bare_spec(make: Make, **options: Any) -> RunSpec:
    return make(defense="none", attacks=("pgd(steps=3)",), **options)


def same_rows(a: Evaluation | StoredRun, b: Evaluation | StoredRun) -> bool:
    return all(
        p.rows[name].tobytes() == q.rows[name].tobytes()
        for p, q in zip(a.results, b.results, strict=True)
        for name in p.rows
    )


def test_a_run_holds_what_the_evaluation_in_memory_gives(make: Make, whole: StoredRun) -> None:
    # Oracle: feint.evaluation.evaluate, which knows nothing of files.
    spec = make()
    resolver = Resolver(spec)
    cell = spec.cells[-1]
    subject, batch = resolver(cell), resolver.samples.read(0, 12)
    direct = evaluate(
        subject.model,
        batch.x,
        batch.y,
        defense=subject.defense,
        attacks=[cell.attack],
        scenarios=["white-box"],
        eps=cell.eps,
        judge_draws=cell.judge_draws,
        seed=cell.seed,
    )
    pair = [r for r in direct.results if r.cell.defense != "none"]
    assert [r.cell.scenario for r in pair] == [r.cell.scenario for r in whole.results]
    for mine, theirs in zip(whole.results, pair, strict=True):
        # Shards of 5 against one batch of 12: the last bit of a convolution may differ.
        for name in ("index", "label", "draws", "correct", "prediction", "first_hit"):
            assert np.array_equal(mine.rows[name], theirs.rows[name])
        assert np.allclose(mine.rows["abs_l2"], theirs.rows["abs_l2"], rtol=1e-4)
        assert (mine.forwards, mine.backwards) == (theirs.forwards, theirs.backwards)


def test_open_run_gives_what_run_gave(make: Make, tmp_path: Path) -> None:
    told: list[Progress] = []
    result = run(make(), tmp_path / "run", on_progress=told.append, command=["feint", "evaluate"])
    stored = open_run(tmp_path / "run")
    plain = result.as_dict()
    again = stored.evaluation.as_dict()
    assert again.pop("seconds") == pytest.approx(plain.pop("seconds"), abs=0.02)
    assert plain == again
    assert same_rows(result, stored)
    assert [r.forwards for r in stored.results] == [r.forwards for r in result.results]
    assert stored.info["sessions"][0]["command"] == ["feint", "evaluate"]
    assert stored.info["given"]["shard_size"] == 5
    assert stored.info["components"] == {"attacks": {"pgd": 1}, "defenses": {"noise": 1}}
    assert stored.spec == make()
    assert (told[0].done, told[-1].done, told[-1].total) == (0, 24, 24)
    assert not any(p.cached for p in told)
    assert stored.verify() == 2 * 2 * 3  # rows and examples, two cells, three shards
    next((tmp_path / "run" / "samples").iterdir()).unlink()
    with pytest.raises(DataError, match="resume it with the same command: feint evaluate"):
        open_run(tmp_path / "run")


def test_two_runs_are_equal_byte_for_byte(make: Make, whole: StoredRun, tmp_path: Path) -> None:
    run(make(), tmp_path / "run")
    assert open_run(tmp_path / "run").result_digest() == whole.result_digest()
    files = [p.relative_to(whole.directory) for p in whole.directory.rglob("*") if p.is_file()]
    for name in files:
        if name.name not in ("run.json", ".lock"):
            assert (tmp_path / "run" / name).read_bytes() == (whole.directory / name).read_bytes()


def test_nothing_is_computed_twice(
    make: Make, whole: StoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole.directory, tmp_path / "run")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    loop = sys.modules["feint.evaluation.loop"]
    for module, name in ((loop, "attack_shard"), (loop, "judge_shard"), (runner, "finish")):
        monkeypatch.setattr(module, name, never)
    told: list[Progress] = []
    again = run(make(), tmp_path / "run", on_progress=told.append)
    assert all(p.cached for p in told)
    assert again.as_dict()["cells"] == whole.evaluation.as_dict()["cells"]
    assert [r.forwards for r in again.results] == [r.forwards for r in whole.results]
    assert open_run(tmp_path / "run").result_digest() == whole.result_digest()
    with pytest.raises(ConfigError, match="holds a run already"):
        run(make(), tmp_path / "run", resume=False)


def test_what_a_run_beside_holds_is_linked_unless_damaged(
    make: Make, bare: StoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Oracle: the run that makes everything itself.
    other = tmp_path / "other"
    shutil.copytree(bare.directory, other)
    (other / "run.json").unlink()  # it need not be whole
    images, rows = (sorted((other / name).iterdir()) for name in ("examples", "samples"))
    damaged = [images[0], rows[-1]]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:-1])
    made: list[str] = []
    for name in ("keep_examples", "keep_rows"):
        keep = getattr(cache.DiskCache, name)

        def watched(
            self: cache.DiskCache, key: str, shard: int, found: Any, keep: Any = keep
        ) -> None:
            made.append(f"{key}-{shard:05d}")
            keep(self, key, shard, found)

        monkeypatch.setattr(cache.DiskCache, name, watched)
    found = run(bare_spec(make), tmp_path / "run", beside=[other, tmp_path / "nothing"])
    lost = {file.stem for file in damaged}
    judges = {planned.key: planned.examples for planned in Resolver(bare_spec(make)).plan()}
    lost |= {f"{k}-{images[0].stem[-5:]}" for k, e in judges.items() if images[0].stem[:-6] == e}
    assert set(made) == lost
    for file in (*images, *rows):
        mine = tmp_path / "run" / file.parent.name / file.name
        assert mine.samefile(file) == (file.stem not in lost)
    assert same_rows(found, bare)


def test_what_linked_units_took_counts(make: Make, bare: StoredRun, tmp_path: Path) -> None:
    # Oracle: the times that the other run noted.
    run(bare_spec(make), tmp_path / "run", beside=[bare.directory])
    assert open_run(tmp_path / "run").info["timing"]["units"] == bare.info["timing"]["units"]


def test_images_are_found_by_their_place(whole: StoredRun, make: Make) -> None:
    # Oracle: the data set, and the distances in the rows.
    batch = Resolver(make()).samples.read(0, 12)
    places = [11, 0, 5, 0]
    clean = whole.clean_images(places)
    assert clean is not None
    assert torch.equal(clean, batch.x[places])
    attacked = whole.images(whole.results[1], places)
    far = (attacked - clean).abs().flatten(1).amax(1).double()
    assert np.allclose(far.numpy(), whole.results[1].rows["linf"][places])
    assert whole.images(whole.results[1], []).shape == (0, 3, 8, 8)
    with pytest.raises(RangeError, match="no sample 12"):
        whole.images(whole.results[0], [12])


def test_an_exception_at_every_file_leaves_what_can_be_gone_on_with(
    make: Make, whole: StoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each attempt writes one file of results and fails at the next, so that every boundary is met.
    write, left = cache.write_atomic, [0]

    def once(path: Path, data: bytes) -> None:
        if left[0] == 0:
            raise RuntimeError("injected")
        left[0] -= 1
        write(path, data)

    monkeypatch.setattr(cache, "write_atomic", once)
    attempts = 0
    while True:
        attempts, left[0] = attempts + 1, 1
        try:
            run(make(), tmp_path / "run")
            break
        except RuntimeError:
            assert open_run(tmp_path / "run", partial=True).status == "error"
    assert attempts == 12  # two cells, three shards, two files each
    stored = open_run(tmp_path / "run")
    assert stored.result_digest() == whole.result_digest()
    assert stored.info["notes"] == []
    assert len(stored.info["sessions"]) == attempts
    assert stored.info["sessions"][0]["status"] == "error"


def test_ctrl_c_can_be_gone_on_with(make: Make, bare: StoredRun, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(bare_spec(make), tmp_path / "run", on_progress=stop)
    with pytest.raises(
        DataError, match=r"interrupted, with about 2 of 6 units; .*feint\.store\.resume"
    ):
        open_run(tmp_path / "run")
    half = open_run(tmp_path / "run", partial=True)
    assert (half.status, half.results, half.positions) == ("interrupted", [], [])
    resume(tmp_path / "run")
    assert open_run(tmp_path / "run").result_digest() == bare.result_digest()


def test_a_partial_run_opens_with_the_cells_that_are_complete(
    make: Make, bare: StoredRun, tmp_path: Path
) -> None:
    def stop(progress: Progress) -> None:
        if progress.position == 1 and progress.done > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(bare_spec(make), tmp_path / "run", on_progress=stop)
    half = open_run(tmp_path / "run", partial=True)
    assert half.positions == [0]
    assert half.results[0].accuracy == bare.results[0].accuracy


def test_units_do_not_depend_on_each_other(
    make: Make, whole: StoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make()
    listed = units(spec)
    assert prepare(spec, tmp_path / "run") == listed
    assert [(u.shard, u.start, u.stop) for u in listed[:3]] == [(0, 0, 5), (1, 5, 10), (2, 10, 12)]
    for unit in reversed(listed):
        assert run_unit(spec, tmp_path / "run", unit)
    assert not run_unit(spec, tmp_path / "run", tuple(listed[0]))  # plain data, and there already
    told: list[Progress] = []
    run(spec, tmp_path / "run", on_progress=told.append)
    assert all(p.cached for p in told)
    assert open_run(tmp_path / "run").result_digest() == whole.result_digest()


def test_a_unit_of_another_run_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepare it first"):
        run_unit(bare_spec(make), tmp_path / "run", ("x", 0, 0, 5))
    prepare(bare_spec(make), tmp_path / "run")
    with pytest.raises(ConfigError, match="has no cell x"):
        run_unit(bare_spec(make), tmp_path / "run", ("x", 0, 0, 5))


def test_no_regression_examples_of_removal_and_white_box_are_told_apart(make: Make) -> None:
    # In `removal` another pipeline is judged, so no sample stops at its first success: the two
    # have other examples, and whichever came first used to lend its own to the other.
    spec = make(scenarios=("white-box", "removal"))
    plan = Resolver(spec).plan()
    addresses = {p.cell.scenario: p.examples for p in plan}
    assert addresses["white-box"] != addresses["removal"]
    # Cells that differ in the judge alone share their examples.
    more = RunSpec(**{**spec.full, "cells": [replace(c, judge_draws=8) for c in spec.cells]})
    assert [p.examples for p in Resolver(more).plan()] == [p.examples for p in plan]
    assert not {p.key for p in Resolver(more).plan()} & {p.key for p in plan}


def test_another_batch_size_gives_the_same_bits_where_rows_do_not_depend_on_batches(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `linear` sums sample by sample: what is left of the batch size is the random draws alone.
    monkeypatch.setattr(health, "check", lambda *_, **__: [])
    runs = []
    for size in (2, 128):
        run(make(model="linear", batch_size=size), tmp_path / str(size))
        runs.append(open_run(tmp_path / str(size)))
    assert same_rows(*runs)
    for a, b in zip(*(r.results for r in runs), strict=True):
        assert torch.equal(runs[0].images(a, range(12)), runs[1].images(b, range(12)))


def test_another_batch_size_changes_at_most_one_row_in_a_hundred_of_a_network(
    make: Make, whole: StoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "check", lambda *_, **__: [])
    run(make(batch_size=3), tmp_path / "run")
    other = open_run(tmp_path / "run")
    changed = [
        (a.rows[name] != b.rows[name]).mean()
        for a, b in zip(whole.results, other.results, strict=True)
        for name in ("correct", "prediction", "first_hit")
    ]
    assert np.mean(changed) <= 0.01


def test_a_run_may_go_on_with_another_batch_size(
    make: Make, whole: StoredRun, tmp_path: Path
) -> None:
    shutil.copytree(whole.directory, tmp_path / "run")
    run(make(batch_size=7, title="again"), tmp_path / "run")
    stored = open_run(tmp_path / "run")
    assert (stored.spec.batch_size, stored.spec.title) == (7, "again")
    assert stored.result_digest() == whole.result_digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_size": 4}, "shard_size: 5 there, 4 given"),
        ({"samples": 6}, "data.samples: None there, 6 given"),
        ({"defense": "noise(scale=0.2)"}, "cells.0.defense: 'noise.*' there, 'noise.*' given"),
        ({"scenarios": ()}, "cells: 2 there, 1 given"),
    ],
)
def test_a_directory_of_another_spec_is_refused(
    make: Make, whole: StoredRun, change: dict[str, Any], message: str
) -> None:
    if "samples" in change:
        change = {"data": {**make().data.model_dump(), "samples": change["samples"]}}
    with pytest.raises(ConfigError, match=f"holds another run .*{message}"):
        run(make(**change), whole.directory)


def test_a_directory_of_which_nothing_came_may_become_another_run(
    make: Make, bare: StoredRun, tmp_path: Path
) -> None:
    prepare(make(), tmp_path / "run")
    run(bare_spec(make), tmp_path / "run")
    assert open_run(tmp_path / "run").result_digest() == bare.result_digest()


@pytest.mark.parametrize(
    ("file", "part"), [("models.py", "the model of cell 0"), ("data.npz", "the samples of cell 0")]
)
def test_what_a_spec_names_must_still_be_what_it_was(
    bench: Path, tmp_path: Path, file: str, part: str
) -> None:
    for name in ("models.py", "data.npz"):
        shutil.copy(bench / name, tmp_path / name)
    model, data = f"{tmp_path}/models.py:conv", {"spec": f"{tmp_path}/data.npz"}
    spec = RunSpec(cells=[Cell("none", model)], data=data)
    run(spec, tmp_path / "run")
    if file == "models.py":  # the weights are the same, the code is not
        text = (tmp_path / file).read_text().replace("nn.SiLU()", "nn.SiLU(inplace=False)")
        (tmp_path / file).write_text(text)
    else:
        arrays = dict(np.load(tmp_path / file))
        arrays["x"][3, 0, 0, 0] ^= 1
        np.savez(tmp_path / file, **arrays)
    with pytest.raises(ConfigError, match=part):
        run(spec, tmp_path / "run")


def test_bad_input_leaves_nothing_behind(bench: Path, make: Make, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", x=np.zeros((3, 3, 8, 8), "uint8"), y=np.array([0, 1, 7]))
    good = make().cells[-1]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": {"spec": f"{tmp_path}/bad.npz"}}, "label 7; expected 0 to 4"),
        ({"data": {"spec": f"{tmp_path}/none.npz"}}, "there is no such file"),
        ({"cells": [replace(good, eps=8.0)]}, "write 8/255"),
        ({"cells": [replace(good, attack="pdg")]}, "did you mean 'pgd'"),
        ({"cells": [replace(good, attack="pgd(stepz=3)")]}, "did you mean 'steps'"),
        ({"cells": [replace(good, attack="pgd(steps=0)")]}, "steps is 0"),
        ({"cells": [replace(good, attack="bim(steps='x')")]}, "bim.*cannot take its settings"),
        ({"cells": [replace(good, defense="noize")]}, "did you mean 'noise'"),
        ({"cells": [replace(good, model=f"{bench}/models.py:con")]}, "did you mean 'conv'"),
        ({"cells": [replace(good, targeted=True)]}, "needs a target"),
        ({"cells": [replace(good, votes=3, defense="none")]}, "nothing in this pipeline is random"),
        ({"cells": [replace(good, attack="pgd(gradient=backprop)")]}, "one draw of a random"),
        ({"cells": [make().cells[0], replace(good, norm="l0")]}, "no norm 'l0'"),
    ]
    for change, message in cases:
        with pytest.raises(FeintError, match=message):
            run(RunSpec(**{**make().full, **change}), tmp_path / "new" / "run")
        assert not (tmp_path / "new").exists()


def test_a_folder_of_other_things_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"not empty and holds no run \(thesis.tex"):
        run(bare_spec(make), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) in (["thesis.tex"], [".lock", "thesis.tex"])


def test_no_run_is_told(tmp_path: Path) -> None:
    for function in (open_run, resume):
        with pytest.raises(DataError, match="holds no run"):
            function(tmp_path)


def test_two_environments_in_one_run_are_a_finding(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(bare_spec(make), tmp_path / "run", on_progress=stop)
    real = environment.describe
    monkeypatch.setattr(environment, "describe", lambda device: {**real(device), "cpu": "other"})
    run(bare_spec(make), tmp_path / "run")
    found = next(f for f in open_run(tmp_path / "run").findings if f.check == "one-environment")
    assert found.status == "warn"
    assert "'other' given" in found.evidence


def test_undeclared_randomness_is_found_and_resumes_equal(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "dropout.py").write_text(
        "from torch import nn\n"
        "class Noisy(nn.Dropout):\n"
        "    def forward(self, x):\n"
        "        return nn.functional.dropout(x, 0.5, True)\n"
        "def model():\n"
        "    return nn.Sequential(Noisy(), nn.AvgPool2d(4), nn.Flatten()).eval()\n"
    )
    spec = RunSpec(
        cells=[Cell("none", f"{tmp_path}/dropout.py:model", judge_draws=4)],
        data={"spec": f"{bench}/data.npz"},
        shard_size=5,
    )
    digests = []
    for name in ("a", "b"):
        if name == "b":
            for unit in prepare(spec, tmp_path / name)[1:2]:
                run_unit(spec, tmp_path / name, unit)
        run(spec, tmp_path / name)
        stored = open_run(tmp_path / name)
        assert [f.status for f in stored.findings if f.check == "unkeyed-randomness"] == ["warn"]
        digests.append(stored.result_digest())
    assert digests[0] == digests[1]


def test_git_is_the_packages_own_checkout_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(environment.feint, "__file__", str(tmp_path / "__init__.py"))
    assert environment.git() is None


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with runner._threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_second_run_in_the_same_directory_is_refused(make: Make, tmp_path: Path) -> None:
    def second(_: Progress) -> None:
        with pytest.raises(DataError, match="in use"):
            run(bare_spec(make), tmp_path / "run")

    run(bare_spec(make), tmp_path / "run", on_progress=second)


def test_runner_exports_what_the_package_names() -> None:
    assert set(runner.__all__) == {"prepare", "resume", "run", "run_unit", "units"}


def test_addresses_see_the_code_of_a_classifier_in_bfloat16(make: Make) -> None:
    plain, rounded, fronted = (
        Resolver(make())(replace(make().cells[0], model=model))
        for model in (
            make().cells[0].model,
            f"bf16:{make().cells[0].model}",
            f"noise(scale=0.1) | bf16:{make().cells[0].model}",
        )
    )
    assert plain.code["model"]  # the digest of the file that holds the function
    assert rounded.code == fronted.code == plain.code
