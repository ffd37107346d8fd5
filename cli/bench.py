"""`powerinfer bench`: how fast an artifact runs here."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from powerinfer_tools.cli import console, options


def bench(
    artifact: options.Artifact,
    mode: options.Mode = options.MODE,
    threads: options.Threads = None,
    vram: options.Vram = options.VRAM,
    ram: options.Ram = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option("--decode-tokens", min=1, help="Tokens to decode.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs; medians are shown.")] = 3,
    kernels: Annotated[
        Literal["best", "scalar", "avx2", "avx512"], typer.Option("--kernels", help="What the engine may use.")
    ] = "best",
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Text to use as the prompt.")] = None,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Show where a token's time and bytes go.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure speed: prompt, decoding, bytes a token, and the share of the memory's ceiling.

    powerinfer bench model.gguf

    powerinfer bench model.gguf --mode dense --breakdown

    powerinfer bench model.gguf --ram 4GiB

    powerinfer bench model.gguf --vram 8GiB

    powerinfer bench model.gguf --json | jq .decode.tokens_per_s
    """
    from powerinfer_tools.bench import PROMPT
    from powerinfer_tools.bench import bench as run

    text = file.read_bytes().decode("utf-8", "replace") if file else PROMPT
    with console.progress() as progress:
        result = run(
            artifact,
            mode="auto" if mode == "sparse" else mode,
            prompt_tokens=prompt_tokens,
            n_tokens=tokens,
            repeats=repeats,
            threads=threads,
            ram=ram,
            vram=vram,
            say=console.say,
            kernels=kernels,
            text=text,
            progress=progress,
        )
    if json:
        console.print_json({**result, "mode": mode})
    else:
        _show({**result, "mode": mode}, breakdown)


def _show(result: dict[str, Any], breakdown: bool) -> None:
    decode, ms = result["decode"], result["decode"]["ms_per_token"]
    prompt = result["prefill"]
    how = f"{result['quant']}, {result['mode']}, {result['threads']} threads, median of {result['runs']}"
    rows = [
        (f"prompt, {prompt['tokens']} tokens", f"{prompt['tokens_per_s']:.1f} tokens/s"),
        (f"decode, {decode['tokens']} tokens", f"{decode['tokens_per_s']:.1f} tokens/s"),
        ("ms a token, p50 / p90 / p99", f"{ms['p50']:.2f} / {ms['p90']:.2f} / {ms['p99']:.2f}"),
        ("bytes a token, in memory", f"{result['bytes_per_token'] / 1e6:.1f} MB"),
        ("memory ceiling, sequential reads", f"{result['ceiling_gb_s']:.1f} GB/s"),
        ("share of the ceiling", f"{result['ceiling_share']:.0%}"),
        ("neurons that fired", f"{result['active_ratio']:.1%}"),
        ("peak memory", console.size(result["peak_rss_bytes"])),
        ("hash of the tokens", result["output_hash"]),
    ]
    if result["predicted_ms_per_token"] is not None:
        rows.insert(3, ("predicted from bytes and bandwidths", f"{result['predicted_ms_per_token']:.2f} ms"))
    console.table(f"{result['model']}, {how}", ["", ""], rows)
    if result["disk"] is not None or result["card"] is not None:
        _show_tiers(result)
    if result["card"] is not None:
        _show_card(result["card"])
    if result["disk"] is not None:
        _show_disk(result)
    if breakdown:
        parts = [(p["part"], f"{p['ms']:.3f}", f"{p['bytes'] / 1e6:.2f}") for p in result["breakdown"]]
        console.table("where a token's time goes", ["part", "ms", "MB"], parts)


def _show_tiers(result: dict[str, Any]) -> None:
    tiers = [
        (tier["name"], console.size(tier["bytes"]), f"{tier['neurons_share']:.1%}", f"{tier['hits_share']:.1%}")
        for tier in result["tiers"]
    ]
    console.table("", ["memory", "neurons' bytes", "of the neurons", "of what tokens asked for"], tiers)


def _show_card(card: dict[str, Any]) -> None:
    budget, head = card["budget"], ", output head" if card["head"] else ""
    rows = [
        ("card", card["name"]),
        ("on it", f"{card['dense_blocks']} dense blocks{head}"),
        ("its budget, all counted", f"{console.size(budget['vram'])}, {console.size(budget['total'])} used"),
        ("read there, a token", f"{card['read_bytes_per_token'] / 1e6:.1f} MB"),
        ("share of its ceiling", f"{card['ceiling_share']:.0%} of {card['ceiling_gb_s']:.0f} GB/s"),
        ("crossed, a token", f"{card['crossed_bytes_per_token'] / 1e3:.1f} kB in {card['transfers_per_token']:.1f}"),
        ("waits for one another, a token", f"{card['waits_per_token']:.1f}, {card['wait_ms_per_token']:.3f} ms"),
    ]
    console.table("", ["", ""], rows)


def _show_disk(result: dict[str, Any]) -> None:
    disk, budget = result["disk"], result["disk"]["budget"]
    rows = [
        ("memory's budget, all counted", f"{console.size(budget['ram'])}, {console.size(budget['total'])} used"),
        ("read from disk, a token", f"{disk['bytes_per_token'] / 1e6:.1f} MB in {disk['reads_per_token']:.0f} reads"),
        ("of that between the neurons", f"{disk['padding_share']:.1%}"),
        ("layers read whole, a token", f"{disk['stream_bytes_per_token'] / 1e6:.1f} MB"),
        ("waiting for the disk, a token", f"{disk['wait_ms_per_token']:.1f} ms"),
        ("first token of the prompt, from the start of loading", f"{result['first_token_s']:.2f} s"),
    ]
    console.table("", ["", ""], rows)
