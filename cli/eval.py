"""`powerinfer eval`: what sparsity costs on a text."""

from typing import Annotated, Any

import typer

from powerinfer_tools.cli import console, options


def eval(
    artifact: options.Artifact,
    corpus: options.Corpus,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to score.")] = 8192,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens of one context.")] = 512,
    threads: options.Threads = None,
    vram: options.Vram = options.VRAM,
    ram: options.Ram = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare the sparse run with the dense one: perplexity, agreement, and each layer's recall.

    powerinfer eval model.gguf --corpus heldout.txt

    powerinfer eval model.gguf --corpus heldout.txt --json | jq .top1_agreement
    """
    from powerinfer_tools.evaluate import evaluate

    with console.progress() as progress:
        how: dict[str, Any] = {"n_tokens": tokens, "window": window, "threads": threads, "ram": ram, "vram": vram}
        result = evaluate(artifact, corpus, **how, say=console.say, progress=progress).as_dict()
    if json:
        console.print_json(result)
    else:
        _show(result)


NAMES = {
    "sparse": "sparse, as it runs",
    "dense": "dense, all neurons",
    "uncut": "the same weights, activation not cut",
}


def _show(result: dict[str, Any]) -> None:
    perplexity = result["perplexity"]
    base = perplexity.get("uncut", perplexity["dense"])
    rows = [
        (f"perplexity, {NAMES[name]}", f"{value:.4f}", f"{value / base - 1:+.2%}") for name, value in perplexity.items()
    ]
    rows.append(("same most likely token, sparse and dense", f"{result['top1_agreement']:.2%}", ""))
    rows.append(("KL divergence, sparse from dense (nats)", f"{result['kl_mean']:.2e}", ""))
    decoding = result["decoding"]
    rows.append((f"the same in decoding, first {decoding['tokens']} tokens", f"{decoding['top1_agreement']:.2%}", ""))
    console.table(f"{result['tokens']} tokens", ["", "", "change"], rows)
    layers = [
        (
            layer["layer"],
            *(f"{layer[key]:.1%}" for key in ("active_ratio", "predicted_ratio", "recall", "precision")),
        )
        for layer in result["layers"]
    ]
    console.table("", ["layer", "active", "let through", "recall", "precision"], layers)
