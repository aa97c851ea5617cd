"""The benchmarks report the right figures for the models that they name."""

import csv
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import measure, tokens
from benchmarks.expectations import verdicts
from benchmarks.methods import EVERY, METHODS, lora_rank, randlora_numbers
from benchmarks.report import Result, markdown, plot, ratios, write_csv
from benchmarks.workloads import WORKLOADS, Row

ROW = Row("sdxl_block", 8, "attention+mlp")


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        return WORKLOADS["sdxl_block"].build()


def small():
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    return BasicTransformerBlock(dim=160, num_attention_heads=4, attention_head_dim=40, cross_attention_dim=96)


def small_inputs(size, device):
    hidden = torch.randn(1, size, 160, device=device, requires_grad=True)
    return {"hidden_states": hidden, "encoder_hidden_states": torch.randn(1, 77, 96, device=device)}


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize("method", METHODS)
def test_flops_counted_without_computing_are_those_of_a_real_step(method, monkeypatch):
    workload = replace(WORKLOADS["sdxl_block"], build=small, inputs=small_inputs)
    monkeypatch.setitem(WORKLOADS, "sdxl_block", workload)
    base = small()
    trainee, _ = measure.prepare(ROW, base, method, torch.device("cpu"), torch.float32)
    assert measure.flops(trainee) == measure.flops(measure.uncomputed(ROW, base, method))


def test_flops_do_not_depend_on_the_kernel_of_attention():
    T, d = 5, 8  # q, k, v (1, 2, T, d / 2): two products in the forward pass, twice as many in the backward pass
    qkv = torch.randn(3, 1, 2, T, d // 2, requires_grad=True)
    trainee = measure.Trainee(Attention(), torch.optim.AdamW([qkv]), {"qkv": qkv}, lambda y: y.sum(), torch.float32)
    assert measure.flops(trainee) == 3 * 2 * (2 * T * T * d)


class Attention(nn.Module):
    def forward(self, qkv):
        return nn.functional.scaled_dot_product_attention(*qkv)


def test_the_budgets_are_equal(base):
    targets = WORKLOADS["sdxl_block"].targets(base, ROW.which)
    budget = randlora_numbers(base, targets, 32)
    for method in ("peft_randlora", "ours", "ours_structured"):
        assert measure.trained(measure.prepare(ROW, base, method, torch.device("meta"), torch.float32)[0]) == budget
    lora = measure.trained(measure.prepare(ROW, base, "peft_lora", torch.device("meta"), torch.float32)[0])
    per_rank = lora // lora_rank(base, targets, budget)
    assert abs(lora - budget) <= per_rank / 2


def test_full_fine_tuning_of_a_layer_costs_six_flops_a_weight_and_token():
    layer = nn.Linear(24, 40, device="meta")
    trainee = measure.Trainee(
        layer,
        torch.optim.AdamW(layer.parameters()),
        {"input": torch.zeros(7, 24, device="meta", requires_grad=True)},
        lambda y: y.sum(),
        torch.float32,
    )
    assert measure.flops(trainee) == 6 * 7 * 24 * 40


def test_kept_bytes_are_those_of_the_activations():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    trainee = measure.Trainee(
        model, torch.optim.AdamW(model.parameters()), {"input": torch.zeros(3, 8)}, lambda y: y.sum(), torch.float32
    )
    assert measure.kept_bytes(trainee) == 4 * 3 * 16  # the ReLU's output; inputs and weights are not counted


def test_the_planner_is_the_lowest_at_every_number_of_tokens(tmp_path, capsys):
    tokens.main(
        ["--outputs", "160", "--inputs", "96", "--timed-tokens", "1", "--rounds", "1", "--output-dir", str(tmp_path)]
    )
    assert "the planner's curve is the lowest" in capsys.readouterr().out
    rows = read_csv(tmp_path / "tokens.csv")
    assert [int(row["tokens"]) for row in rows] == [2**power for power in range(17)]
    assert all(int(row["FLOPs, full fine-tuning"]) == 6 * int(row["tokens"]) * 160 * 96 for row in rows)
    assert (tmp_path / "tokens.png").stat().st_size > 10_000


def test_a_curve_above_another_is_named():
    flops = {"ours, auto": [10, 30], "ours, always dense": [20, 20], "ours, always factored": [10, 40]}
    words = tokens.verdict([1, 2], {**flops, "PEFT RandLora": [11, 31]})
    assert words == "the planner's curve is above: 1.500 times ours, always dense at 2 tokens"


def results():
    title = "ViT-B/16, 16 images, attention+mlp"
    seconds = {"full": 2.0, "peft_lora": 1.0, "peft_randlora": 4.0, "ours": 3.2, "ours_structured": 1.2}
    return [
        Result(title, name, 100, round(value * 1e9), [value, 2 * value, value], peak_bytes=round(value * 1e9))
        for name, value in seconds.items()
    ]


def test_tables_and_verdicts(tmp_path):
    measured = results()
    by = {result.method: result for result in measured}
    assert ratios(by["ours"], by["peft_randlora"]) == pytest.approx([0.8, 0.8, 0.8])
    write_csv(measured, tmp_path / "step.csv")
    rows = read_csv(tmp_path / "step.csv")
    assert [float(row["step_time_to_peft_lora"]) for row in rows] == [2.0, 1.0, 4.0, 3.2, 1.2]
    assert "| ours, dense bases | 100 | 3.2 | 0.80 | 3.20 | 0.80 (0.80-0.80) |" in markdown(measured)
    plot(measured, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000
    lines = verdicts(measured)
    assert any("step time of ours to peft_randlora" in line and "MISSED by 7%" in line for line in lines)
    assert any("step time of ours_structured to peft_lora" in line and line.endswith("met") for line in lines)


def kept_by(choice, device, tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)).requires_grad_(False)
    model = EVERY[choice].apply(model, ["0", "2"], 8).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    x = torch.randn(tokens, 24, device=device, requires_grad=True)
    return measure.kept_bytes(measure.Trainee(model, optimizer, {"input": x}, torch.sum, torch.float32))


def test_bytes_are_counted_without_computing_and_compute_memory_keeps_the_fewest():
    auto, fewest = "ours", "ours_memory"
    for choice in (auto, fewest, "peft_lora"):
        assert kept_by(choice, "meta", 100) == kept_by(choice, "cpu", 100) > 0
    assert kept_by(fewest, "meta", 9000) < kept_by(auto, "meta", 9000)
    shared = 4 * 96 * 24  # B, one for all layers of a model
    assert kept_by(fewest, "meta", 9000) - shared < kept_by("peft_randlora", "meta", 9000)
