"""The benchmarks on tiny models: what they say, and that a wrong result is said to be wrong. Nothing here is timed."""

import json
import math
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY

from minisd.bench import attention, load, pairs, train, txt2img, unet, vae
from minisd.bench.compare import compare
from minisd.bench.machine import machine
from minisd.bench.options import BenchOptions, ImageBenchOptions
from minisd.bench.pairs import ContenderResult, MeasuredCase, interval, relative_error
from minisd.bench.peers import select, with_known_peers
from minisd.bench.process import Worker, WorkerError, in_fresh_process, resident
from minisd.bench.publish import publish
from minisd.bench.report import BenchReport
from minisd.bench.startup import profile
from minisd.bench.weights import write_random_folder
from minisd.cli import main
from minisd.config import SD1

CONFIG = TINY["SD1"]
WORDS = {"vocab_size": 49408, "bos_id": 49406, "eos_id": 49407, "pad_id": 49407}
READING = replace(CONFIG, text=replace(CONFIG.text, **WORDS))  # with the real vocabulary
ALONE = ImageBenchOptions(peers=("none",), pairs=2, size=(32,))


# ------------------------------------------------------------------------------------------------- what is measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("random")
    write_random_folder(place, CONFIG)
    return place


CASES = [
    unet.GuidedStep(CONFIG, 32, 2, "float32"),
    vae.VAEPass(CONFIG, "decode", 32, 2, "float32"),
    vae.VAEPass(CONFIG, "encode", 32, 2, "float32"),
]


@pytest.mark.parametrize("case", CASES, ids=["unet", "decode", "encode"])
def test_minisd_and_diffusers_are_measured_on_the_same_arithmetic(case, folder):
    pytest.importorskip("diffusers")
    subject = unet if isinstance(case, unet.GuidedStep) else vae
    with torch.no_grad():
        ours, theirs = (subject.CONTENDERS[name](folder, case)().numpy() for name in ("minisd", "diffusers"))
        again = subject.CONTENDERS["minisd"](folder, replace(case, dtype="bfloat16"))()
    assert ours.std() > 0.05  # the random network passes a signal on
    assert relative_error(ours, theirs) < 2e-5
    assert again.dtype == torch.bfloat16
    assert 1e-4 < relative_error(again.float().numpy(), theirs) < 0.05  # bfloat16 has 8 bits


def test_whole_pictures_are_those_of_the_peer(tmp_path):
    """From the same noise, to a level of 256; the real vocabulary, since diffusers' tokenizer knows no other."""
    pytest.importorskip("diffusers")
    write_random_folder(tmp_path, READING)
    case = txt2img.TextToImage(READING, 32, 2, 3, "float32")
    with torch.no_grad():
        ours, theirs = (txt2img.CONTENDERS[name](tmp_path, case)().numpy() for name in ("minisd", "diffusers"))
    assert ours.std() > 0.05
    assert np.abs(ours[0] - ours[1]).max() > 0.05
    assert relative_error(ours, theirs) < 1 / 255
    step = unet.GuidedStep(READING, 32, 2, "float32")
    assert case.flop() == 3 * step.flop() + vae.VAEPass(READING, "decode", 32, 2, "float32").flop()


@pytest.mark.parametrize("method", [name.replace("_", "-") for name in train.METHODS])
def test_training_steps_are_those_of_diffusers_examples(method, tmp_path):
    """At the first step, and after it; in bfloat16 as near as diffusers comes."""
    pytest.importorskip("peft")
    write_random_folder(tmp_path, READING)
    case = train.TrainingStep(READING, method, 32, 2, "float32", gradient_checkpointing=True)
    ours, theirs = (train.CONTENDERS[name](tmp_path, case) for name in ("minisd", "diffusers"))
    exact = ours().numpy()
    assert relative_error(exact, theirs().numpy()) < 1e-5
    assert relative_error(ours().numpy(), theirs().numpy()) < 1e-5  # a step further
    _, noise = case.latents_and_noise()
    first, second = ((output - noise.numpy()) ** 2 for output in exact)
    assert second.mean() < first.mean()  # it learns
    rounded = [contender(tmp_path, replace(case, dtype="bfloat16"))() for contender in train.CONTENDERS.values()]
    off, allowed = (relative_error(output.float().numpy(), exact) for output in rounded)
    assert 1e-3 < off < 1.1 * allowed


def test_a_start_is_taken_apart_by_the_commands_own_functions(tmp_path):
    phases = profile(Path(__file__).parent / "data" / "tiny.safetensors", tmp_path / "a.png", "a red apple")
    assert list(phases) == ["import", "load", "text", "30 steps", "decode", "save"]
    assert min(phases.values()) >= 0
    assert Image.open(tmp_path / "a.png").size == (64, 64)


def test_operations_are_counted_at_the_official_size_without_computing():
    """1.61 TFLOP for a guided step of SD1 at 512², 2.51 for a decoding; twice the pictures, twice the operations."""
    assert unet.GuidedStep(SD1, 512, 1, "bfloat16").flop() == pytest.approx(1.61e12, rel=0.005)
    assert vae.VAEPass(SD1, "decode", 512, 1, "float32").flop() == pytest.approx(2.51e12, rel=0.005)
    assert unet.GuidedStep(CONFIG, 32, 4, "float32").flop() == 4 * unet.GuidedStep(CONFIG, 32, 1, "float32").flop()


def test_the_random_weights_are_the_same_every_time(folder, tmp_path):
    write_random_folder(tmp_path, CONFIG, ("unet",))
    file = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    assert not (tmp_path / "vae").exists()


# --------------------------------------------------------------------------------------------------------- processes


def broken():
    raise ValueError("of no use\nat all")


def hungry():
    held = torch.ones(50_000_000)
    return lambda: held[:1]


def test_a_worker_runs_times_and_weighs_a_program_in_its_own_process():
    before = resident()
    with Worker(hungry) as worker:
        assert worker.output().tolist() == [1.0]
        assert 0 < worker.seconds() < 1
        assert worker.peak() >= 200e6
    assert resident() - before < 150e6


def test_what_fails_in_a_worker_is_told_in_one_sentence():
    with pytest.raises(WorkerError, match=r"^ValueError: of no use$"):
        in_fresh_process(broken)


# -------------------------------------------------------------------------------------------------------- statistics


def test_the_interval_of_the_median_is_the_binomial_one():
    assert interval([3.0]) == (3, 3, 3)
    assert interval([1, 2, 3, 4, 5]) == (3, 1, 5)  # covers 1 - 2/32 = 94 %
    assert interval([8, 1, 7, 2, 6, 3, 5, 4]) == (4.5, 2, 7)  # 1 - 2·(1 + 8)/256 = 93 %
    draws, rng = [], np.random.default_rng(0)
    for _ in range(2000):
        _, low, high = interval(list(rng.standard_exponential(9)))
        draws.append(low <= math.log(2) <= high)
    assert sum(draws) >= 0.9 * len(draws)


def test_ratios_are_taken_pair_by_pair_and_the_report_keeps_the_largest():
    one = MeasuredCase(
        {"size": 1},
        {
            "minisd": ContenderResult([1, 2, 9]),
            "peer": ContenderResult([2, 4, 6]),
            "gone": ContenderResult(failed="no"),
        },
    )
    two = MeasuredCase({"size": 2}, {"minisd": ContenderResult([3, 3, 3]), "peer": ContenderResult([4, 4, 4])})
    assert one.ratios() == {"peer": (0.5, 0.5, 1.5)}
    assert report(one, two).ratios() == {"peer": 0.75}


@pytest.mark.parametrize("off", [2.1e-5, float("nan"), float("inf")])
def test_a_wrong_result_is_said_to_be_wrong(off, capsys):
    def case(distance):
        return MeasuredCase(
            {"size": 8}, {"minisd": ContenderResult([1], 1, distance, 2e-5), "diffusers": ContenderResult([1], 1, 0.0)}
        )

    assert report(case(1.9e-5)).wrong() == []
    outcome = report(case(off))
    assert outcome.wrong() == [f"size 8: minisd is off by {off:.1e}, 2.0e-05 is allowed"]
    json.dumps(outcome.as_json(), allow_nan=False)
    assert publish([outcome], outcome.options) == 1
    assert "WRONG RESULT: unet, size 8: minisd is off" in capsys.readouterr().out


def test_what_was_measured_before_a_benchmark_breaks_off_is_kept(tmp_path, capsys):
    def reports():
        yield BenchReport("unet", "the first", machine(), BenchOptions())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(reports(), BenchOptions(json=tmp_path / "all.json"))
    assert "the first" in capsys.readouterr().out
    assert json.loads((tmp_path / "all.json").read_text())["what"] == "the first"


def report(*cases):
    return BenchReport("unet", "a step", machine(), BenchOptions(), list(cases))


# ------------------------------------------------------------------------------------------------------ from end to end


def test_a_benchmark_prints_a_table_and_writes_json_and_a_picture(tmp_path, capsys, monkeypatch):
    options = replace(ALONE, json=tmp_path / "a.json", plot=tmp_path / "a.png")
    monkeypatch.setattr(unet, "compare", partial(compare, matmul_side=64))
    assert publish([unet.bench_unet(options, CONFIG)], options) == 0
    out = capsys.readouterr().out
    assert "| size | batch |" in out
    assert f"torch {torch.__version__}" in out
    outcome = json.loads(options.json.read_text())
    assert [(case["size"], case["batch"]) for case in outcome["cases"]] == [(32, 1)]
    assert outcome["ratios"] == {}
    for case in outcome["cases"]:
        ours = case["results"]["minisd"]
        assert len(ours["seconds"]) == 2
        assert ours["median"] == statistics.median(ours["seconds"])
        assert ours["peak"] > 0
        assert case["peak_flops"] > 0
    assert options.plot.stat().st_size > 10_000


class Here:
    """A Worker that stays in this process, and notes its turns."""

    turns: ClassVar[list] = []

    def __init__(self, build, device):
        self.run = build()

    def output(self):
        return self.run().numpy()

    def seconds(self):
        self.turns.append(float(self.run().flatten()[0]))
        return 1.0

    def peak(self):
        return 7

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def gives(value):
    return lambda folder, case: partial(torch.full, (3,), value)


def absent(folder, case):
    raise WorkerError("OSError: there is no such thing")


def test_peers_take_turns_and_one_that_fails_stops_nobody(monkeypatch):
    monkeypatch.setattr(pairs, "Worker", Here)
    contenders = {"minisd": gives(1.1), "diffusers": gives(2.0), "other": absent}
    measured = partial(
        pairs.measure, unet.GuidedStep(CONFIG, 8, 1, "float32"), folder=None, options=ALONE, matmul_side=8
    )
    outcome = measured(contenders, reference=contenders["diffusers"]).results
    assert [round(x, 1) for x in Here.turns if round(x, 1) in (1.1, 2.0)] == [1.1, 2.0, 2.0, 1.1]
    assert outcome["minisd"].distance == pytest.approx(0.9 / 2)
    assert outcome["diffusers"].distance == 0
    assert outcome["minisd"].allowed == 2e-5
    assert (outcome["minisd"].seconds, outcome["minisd"].peak) == ([1.0, 1.0], 7)
    assert (outcome["other"].failed, outcome["other"].seconds) == ("OSError: there is no such thing", [])
    with pytest.raises(WorkerError, match="no such thing"):
        measured({"minisd": absent})


def test_half_precision_is_held_to_the_reference_in_float32(monkeypatch):
    monkeypatch.setattr(pairs, "Worker", Here)

    def reference(folder, case):
        return gives({"float32": 1.0, "bfloat16": 0.75}[case.dtype])(folder, case)

    case = unet.GuidedStep(CONFIG, 8, 1, "bfloat16")
    contenders = {"minisd": gives(0.5), "diffusers": reference}
    outcome = pairs.measure(case, contenders, None, ALONE, reference=reference, matmul_side=8).results
    assert (outcome["minisd"].distance, outcome["diffusers"].distance) == (0.5, 0.25)
    assert outcome["minisd"].allowed == pytest.approx(0.275)  # a tenth more than the reference's own in bfloat16
    assert outcome["minisd"].wrong


def test_training_is_measured_in_fresh_processes():
    options = ImageBenchOptions(peers=("none",), pairs=2, size=(32,))
    report = train.bench_train(options, READING, methods=("lora",))
    (case,) = report.cases
    assert len(case.results["minisd"].seconds) == 2
    assert case.results["minisd"].peak > 0
    assert case.flop == unet.GuidedStep(CONFIG, 32, 1, "float32").flop()  # half a guided step, forward and backward
    with pytest.raises(ValueError, match="unknown method 'hypernetwork'; known: textual-inversion, lora, dreambooth"):
        train.bench_train(options, CONFIG, methods=("hypernetwork",))
    with pytest.raises(ValueError, match="float16 is no precision to train in"):
        train.bench_train(replace(options, dtype="float16"), CONFIG)


def test_loading_is_measured_in_fresh_processes():
    options = BenchOptions(dtype="float16", peers=("none",), pairs=1)
    outcome = load.bench_load(options, CONFIG)
    ours = outcome.cases[0].results["minisd"]
    assert "loaded as float32" in outcome.what
    assert 0 < ours.seconds[0] < ours.more["fastest, every weight used"]
    assert ours.peak > 0


# --------------------------------------------------------------------------------------------------------- attention


def test_every_implementation_of_attention_is_held_to_float64():
    options = BenchOptions(dtype="bfloat16", pairs=1)
    outcome = attention.measure_implementations(
        attention.AttentionShape(2, 2, 100, 77, 40), attention.implementations(), options
    )
    results = outcome.results
    assert {"minisd", "naive", "sdpa", "sdpa:math", "sdpa:flash"} <= set(results)
    assert outcome.flop == 4 * 2 * 2 * 100 * 77 * 40
    assert "no CUDA" in results["fused"].failed or "GPU" in results["fused"].failed
    assert not any(result.wrong for result in results.values())
    assert results["naive"].allowed == pytest.approx(1.5 * results["naive"].distance, rel=0.05)  # it rounds once
    assert results["sdpa"].allowed is None  # a peer
    assert "naive" not in outcome.ratios()
    assert "sdpa" in outcome.ratios()


def test_an_implementation_of_minisd_that_is_off_is_wrong():
    def faint(q, k, v):
        return 0.99 * attention.implementations()["naive"](q, k, v)

    options, shape = BenchOptions(dtype="bfloat16", pairs=1), attention.AttentionShape(1, 1, 20, 20, 40)
    outcome = attention.measure_implementations(shape, {"minisd": faint, "sdpa": faint}, options).results
    assert (outcome["minisd"].wrong, outcome["sdpa"].wrong) == (True, False)


def test_training_is_measured_with_the_backward_pass():
    options, shape = BenchOptions(pairs=1), attention.AttentionShape(1, 1, 20, 20, 40)
    forward = attention.measure_implementations(shape, attention.implementations(("none",)), options)
    training = attention.measure_implementations(shape, attention.implementations(("none",)), options, backward=True)
    assert training.flop == 3.5 * forward.flop
    assert {name for name, result in training.results.items() if result.seconds} >= {"minisd", "naive", "matmul"}
    with pytest.raises(ValueError, match="unknown peer 'fa9'; known here: none, sdpa"):
        attention.implementations(("fa9",))


# ----------------------------------------------------------------------------------------------------------- misuse


def test_peers_are_those_that_were_asked_for():
    assert list(select(unet.CONTENDERS, ("none",))) == ["minisd"]
    assert "diffusers-compiled" not in select(unet.CONTENDERS, None)  # minutes of compiling: only where it is named
    with pytest.raises(ValueError, match="unknown peer 'diffuser'; known here: none, diffusers"):
        select(unet.CONTENDERS, ("diffuser",))


def test_every_subject_of_bench_all_takes_the_peers_it_knows():
    asked = ImageBenchOptions(peers=("diffusers", "openvino"))
    assert with_known_peers(unet.CONTENDERS, asked).peers == ("diffusers", "openvino")
    assert with_known_peers(load.CONTENDERS, asked).peers == ("diffusers",)
    assert with_known_peers(attention.implementations(), asked).peers is None


def test_what_one_benchmark_refuses_does_not_cost_the_others_their_report(monkeypatch, capsys, tmp_path):
    for name in ("unet", "vae", "txt2img", "load", "attention"):
        done = BenchReport(name, f"what {name} did", machine("cpu"), ImageBenchOptions())
        monkeypatch.setattr(f"minisd.bench.{name}.bench_{name}", lambda *_, done=done, **__: done)
    line = ["all", "--dtype", "float16", "--peers", "none", "--json", str(tmp_path / "all.json")]
    assert main(["bench", *line]) == 1
    assert "float16 is no precision to train in here" in capsys.readouterr().err
    assert "what attention did" in (tmp_path / "all.json").read_text()


def test_a_peer_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert list(select(unet.CONTENDERS, None)) == ["minisd"]
    with pytest.raises(ValueError, match="the peer openvino is not installed: pip install openvino"):
        select(unet.CONTENDERS, ("openvino",))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("unet --pairs 0", "pairs is 0: give 1 or more"),
        ("unet --size 500", "size 500 is not a multiple of 8"),
        ("vae --batch 0,1", "batch is '0,1'"),
        ("vae --size ,", "size is ''"),
        ("vae --size 512,x", "Invalid value"),
        ("unet --peers nobody", "unknown peer 'nobody'"),
        ("unet --json .", "is a folder"),
        ("unet --plot a.bmp", "a figure is saved as"),
        ("load --device cuda:77", "cannot be used"),
    ],
)
def test_misuse_is_told_before_anything_is_made(line, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *line.split()]) in (1, 2)
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_peer_that_dies_on_the_way_is_taken_out_and_the_others_are_measured_on():
    class Timed:
        def __init__(self, turns: float):
            self.turns = turns

        def seconds(self) -> float:
            self.turns -= 1
            if self.turns < 0:
                raise WorkerError("its process died")
            return 1.0

    def measured(minisd: float, peer: float) -> pairs.MeasuredCase:
        workers = {"minisd": Timed(minisd), "peer": Timed(peer), "other": Timed(3)}
        outcome = pairs.MeasuredCase({"size": 1}, {name: pairs.ContenderResult() for name in workers})
        list(pairs._take_turns(workers, Timed(3), outcome, 3))
        return outcome

    outcome = measured(3, 1)
    assert outcome.results["peer"].failed == "its process died"
    assert {name: len(r.seconds) for name, r in outcome.results.items()} == {"minisd": 3, "peer": 0, "other": 3}
    assert set(outcome.ratios()) == {"other"}
    with pytest.raises(WorkerError):
        measured(1, 3)
