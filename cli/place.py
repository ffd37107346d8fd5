"""`powerinfer place`: which memory holds what."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from powerinfer_tools.cli import console, options

if TYPE_CHECKING:
    from powerinfer_tools.placement import Machine, Placement

Explain = Annotated[
    bool,
    typer.Option(
        "--explain", rich_help_panel=options.OUTPUT, help="Show each layer's prefixes, expected hits and time."
    ),
]


def place(
    model: options.Checkpoint,
    activations: options.Activations,
    output: options.Output,
    predictors: options.Predictors = None,
    vram: options.Vram = options.VRAM,
    ram: options.Ram = None,
    machine: options.Machine = None,
    ctx_size: options.CtxSize = None,
    quant: options.Quant = options.QUANT,
    objective: options.Objective = options.OBJECTIVE,
    activation: options.Activation = None,
    patch: options.Patch = None,
    threads: options.Threads = None,
    explain: Explain = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Decide which neurons and layers go to GPU memory, RAM and disk.

    Within a layer the neurons that fire most come first: [0, k1) in vram, [k1, k2) in ram, the rest on disk.

    Examples:

        powerinfer place model/ --activations model.activations -o model.placement

        powerinfer place model/ --activations model.activations --vram 8GiB --ram 12GiB --explain -o model.placement

        powerinfer place model/ --activations model.activations --vram 8GiB --objective impact -o impact.placement
    """
    from powerinfer_tools.activations import apply, read_activations
    from powerinfer_tools.artifact.layout import MODE_GATE, LayerPlan
    from powerinfer_tools.checkpoint import open_checkpoint
    from powerinfer_tools.files import check_writable, require_same
    from powerinfer_tools.placement import file, let_through
    from powerinfer_tools.placement import place as solve
    from powerinfer_tools.predictors import read_predictors

    check_writable(output, force)
    checkpoint = open_checkpoint(model, activation, patch)
    profile = read_activations(activations)
    apply(profile, checkpoint)
    inputs = {"checkpoint": profile.checkpoint_digest}
    plans, ratios = [LayerPlan(MODE_GATE)] * checkpoint.config.n_layer, None
    if predictors is not None:
        trained = read_predictors(predictors)
        remedy = f"make them with: powerinfer train {options.named(model, patch)} --activations {activations}"
        require_same("profile", predictors, profile.digest, trained.activations_digest, remedy)
        plans, ratios = trained.plans, let_through(trained.plans, trained.figures)
        inputs["predictors"] = trained.digest
    placement = solve(
        checkpoint.config,
        profile,
        plans,
        quant=quant,
        head=checkpoint.head_type(quant),
        biases=checkpoint.biases,
        ctx_size=ctx_size or checkpoint.config.n_ctx,
        machine=_machine(machine, output, threads, vram > 0),
        vram=vram,
        ram=ram,
        objective=objective,
        let_through=ratios,
        inputs=inputs,
    )
    file.write_placement(placement, output, force)
    if json:
        console.print_json(file.placement_json(placement))
    else:
        _show(placement, explain)
    with_predictors = f" --predictors {predictors}" if predictors else ""
    files = f"--activations {activations}{with_predictors} --placement {output}"
    following = f"powerinfer split {options.named(model, patch)} {files} --quant {quant}"
    console.wrote(output, f"{following} -o {output.with_suffix('.gguf')}")


def _machine(path: Path | None, output: Path, threads: int | None, card: bool) -> "Machine":
    from powerinfer_tools.placement import cached_machine, read_machine

    if path is not None:
        return read_machine(path)
    return cached_machine(output.resolve().parent, threads, console.say, card)


def _show(placement: "Placement", explain: bool) -> None:
    rows = [
        (tier, console.size(placement.n_bytes[tier]), _budget(placement.budgets.get(tier)), f"{hits:.1%}")
        for tier, hits in placement.hits.items()
    ]
    console.table("", ("memory", "holds", "budget", "share of firings"), rows)
    if explain:
        columns = ("layer", "block", "vram [0, k1)", "ram [k1, k2)", "disk", "firing", "hits vram / ram / disk", "ms")
        console.table("", columns, [_layer_row(placement, i) for i in range(placement.n_layer)])
    head = "; output head in vram" if placement.head else ""
    console.say(
        f"{placement.expected_ms:.2f} ms a token expected, the context half full{head}; "
        f"objective {placement.objective}, at most {placement.gap:.2%} from the best"
    )


def _budget(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else console.size(n_bytes)


def _layer_row(placement: "Placement", i: int) -> tuple[object, ...]:
    k1, k2, layer = placement.vram[i], placement.ram[i], placement.layers[i]
    hits = " / ".join(f"{layer['hits'][tier]:.0%}" for tier in ("vram", "ram", "disk"))
    block = "vram" if placement.dense[i] else "ram"
    return i, block, k1, k2 - k1, placement.n_ff - k2, f"{layer['fires']:.1f}", hits, f"{layer['ms']:.3f}"
