"""`powerinfer machine`: how fast this machine's memories are."""

from pathlib import Path
from typing import TYPE_CHECKING

from powerinfer_tools.cli import console, options

if TYPE_CHECKING:
    from powerinfer_tools.placement import Machine


def machine(
    output: options.OptionalOutput = None,
    threads: options.Threads = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure this machine: RAM, the disk where the output goes (else here), and a card if there is one.

    What it finds is kept, too: `--vram`, `place` and `build` plan with the last measurement with as many threads.

    Examples:

        powerinfer machine

        powerinfer machine -o this.machine

        powerinfer machine -t 2 --json | jq .ram.sequential
    """
    from powerinfer_tools.files import check_writable
    from powerinfer_tools.placement import keep_machine, measure_machine, write_machine

    if output is not None:
        check_writable(output, force)
    folder = output.resolve().parent if output is not None else Path.cwd()
    measured = measure_machine(threads, folder, console.say)
    if output is not None:
        write_machine(measured, output, force)
    kept = keep_machine(measured)
    if json:
        console.print_json(measured.to_json())
    else:
        _show(measured)
    console.say(f"kept in {kept}: what --vram, place and build plan with, {measured.threads} threads", style="dim")
    if output is not None:
        console.wrote(output, f"powerinfer place MODEL --activations FILE --machine {output} -o FILE")


def _show(machine: "Machine") -> None:
    rows = []
    for name in ("vram", "ram", "disk"):
        tier = getattr(machine, name)
        if tier is not None:
            picked = ", ".join(f"{size} B {speed / 1e9:.2f}" for size, speed in tier.rows)
            latency = f"{tier.latency_s * 1e6:.0f} µs" if tier.latency_s else "-"
            rows.append(
                (name, console.size(tier.n_bytes), f"{tier.sequential / 1e9:.2f} GB/s", f"{picked} GB/s", latency)
            )
    columns = ("memory", "size", "in sequence", "picked rows or reads", "latency")
    console.table(f"{machine.name}, {machine.threads} threads", columns, rows)
    if machine.card and machine.vram is not None:
        card = machine.vram
        steps = f"{card.launch_s * 1e6:.1f} µs a step, {2 * card.latency_s * 1e6:.0f} µs a vector there and back"
        copies = f"copies to there at {card.copy / 1e9:.1f} GB/s"
        console.say(f"{machine.card}: {steps}, {copies}, {console.size(card.context)} taken before anything is stored")
    for note in machine.notes:
        console.say(note, style="dim")
