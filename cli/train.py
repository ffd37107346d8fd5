"""`powerinfer train`: checkpoint and activations → predictors."""

from typing import Any

from powerinfer_tools.cli import console, options


def train(
    model: options.Checkpoint,
    activations: options.Activations,
    output: options.Output,
    recall: options.Recall = options.RECALL,
    error: options.Error = options.ERROR,
    top1: options.Top1 = options.TOP1,
    perplexity: options.Perplexity = options.PERPLEXITY,
    quant: options.Quant = options.QUANT,
    activation: options.Activation = None,
    patch: options.Patch = None,
    seed: options.BuildSeed = options.BUILD_SEED,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train predictors for the layers where they save bytes; a killed run goes on where it stopped.

    powerinfer train model/ --activations model.activations -o model.predictors

    powerinfer train model/ --activations model.activations --recall 0.99 --quant q8_0 -o model.predictors

    powerinfer train model/ --activations model.activations -o model.predictors --json | jq '.layers[].recall'
    """
    from powerinfer_tools.activations import read_activations
    from powerinfer_tools.checkpoint import open_checkpoint
    from powerinfer_tools.predictors import train as train_predictors

    checkpoint = open_checkpoint(model, activation, patch)
    with console.progress() as progress:
        predictors = train_predictors(
            checkpoint,
            read_activations(activations),
            output,
            recall=recall,
            error=error,
            top1=top1,
            perplexity=perplexity,
            quant=quant,
            seed=seed,
            force=force,
            progress=progress,
        )
    for note in checkpoint.notes:
        console.say(f"note: {note}")
    loss = predictors.loss
    gates = {figures["layer"] for figures in predictors.figures if figures["mode"] == "gate"} - set(loss["dropped"])
    for why, layers in (("saved enough bytes", gates), ("left the model's answers as they are", loss["dropped"])):
        if layers:
            console.say(f"in gate mode, where no predictor {why}: layers {', '.join(map(str, sorted(layers)))}")
    console.say(
        f"in the whole model, over {loss['tokens']} held-out tokens: the likeliest next token stays the same for "
        f"{loss['top1']:.2%}, perplexity {loss['perplexity']:+.2%}"
    )
    files = f"--activations {activations} --predictors {output}"
    following = f"powerinfer split {options.named(model, patch)} {files} --quant {quant}"
    console.wrote(output, f"{following} -o {output.with_suffix('.gguf')}")
    if json:
        kind = "relu" if predictors.relu else "linear"
        console.print_json(
            {"path": str(output), "quant": quant, "kind": kind, "loss": loss, "layers": predictors.figures}
        )
    else:
        show(predictors.figures)


def show(figures: list[dict[str, Any]]) -> None:
    """A line a layer: of the predictor, whether the plan takes it or not."""
    columns = (
        "layer",
        "mode",
        "active",
        "computed",
        "recall",
        "precision",
        "error",
        "rank",
        "always",
        "KB a token",
        "of gate",
    )
    rows = [
        (
            f["layer"],
            f["mode"],
            f"{f['active']:.1%}",
            f"{f['predicted']:.1%}",
            f"{f['recall']:.1%}",
            f"{f['precision']:.1%}",
            f"{f['output_error']:.2%}",
            f["rank"],
            f["always"],
            f"{f['bytes_predictor'] / 1000:.0f}",
            f"{f['bytes_predictor'] / f['bytes_gate']:.0%}",
        )
        for f in figures
    ]
    console.table("on held-out samples", columns, rows)
