"""An account as text for the terminal and as Markdown: aligned columns, units in the headings."""

from __future__ import annotations

from collections.abc import Sequence

from lightm.lab.complexity.account import Account

Row = Sequence[str]

SYMBOLS = (
    "C width of a layer, O width behind it, E = expand C, N states, R = ceil(C / 16), K = 4 taps, I image channels, "
    "H = C / 2, P channels of a Mamba-2 head (16, or E if fewer); "
    "with g parts, primes mark the width C' = C / g of one part and what follows from it."
)
DEFINITIONS = (
    "multiply-add: a product with the addition of its result, in matrix products, convolutions, attention, linear "
    "interpolation and the scan (3 a token, channel and state: the state's update, the output's sum, and the lone "
    "products dt A and dt u B, half each; in Mamba-2 dt A once a head, so 2.5 and half a one a token and head). "
    "Element-wise products, norms and poolings are not counted.",
    "exponential: one a token, channel and state in the scan, in Mamba-2 one a token and head; one "
    "an element in SiLU, softplus, sigmoid, softmax, "
    "tanh and GELU.",
)
MEMORY_NOTE = (
    "plain composition of the operators, without weights; the fused CPU path needs less, measured by `lightm bench`"
)


def aligned(rows: Sequence[Row], *, left: int = 1) -> list[str]:
    """Return rows as lines of equal columns, the first `left` columns flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown(rows: Sequence[Row], *, left: int = 1) -> list[str]:
    """Return rows, the first of them the heading, as a Markdown table; numbers flush right."""
    rule = ["---" if i < left else "---:" for i in range(len(rows[0]))]
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]


def giga(number: int) -> str:
    """Return 1e9 as 1.00, with three digits at least; nothing at all as 0."""
    if not number:
        return "0"
    value = number / 1e9
    return f"{value:,.{0 if value >= 1000 else 2 if value >= 1 else 3}f}"


def mebibytes(number: int) -> str:
    """Return bytes as whole MiB, with separators."""
    return f"{number / 2**20:,.0f}"


def source_rows(account: Account) -> list[Row]:
    """Parameters by source: the closed forms of one layer, their sum over the network, and the count."""
    table = account.parameters
    counted, expected, texts = table.by("source"), table.expected_by_source(), table.formulas()
    rows: list[Row] = [("source", "formula of one layer", "formula's sum", "counted")]
    for source, number in counted.items():
        value = expected[source]
        rows.append((source, "; ".join(texts[source]) or "-", "-" if value is None else f"{value:,}", f"{number:,}"))
    known = [value for value in expected.values() if value is not None]
    total = f"{sum(known):,}" if len(known) == len(expected) else "-"
    return [*rows, ("total", "", total, f"{table.total:,}")]


def grouped_rows(account: Account, what: str) -> list[Row]:
    """Parameters summed by `stage` or `kind`, and their share."""
    table = account.parameters
    rows: list[Row] = [(what, "parameters", "share")]
    for key, number in table.by(what).items():
        rows.append((key, f"{number:,}", f"{100 * number / table.total:.1f} %"))
    return rows


def operation_rows(account: Account) -> list[Row]:
    """Multiply-adds and exponentials by kind, in 1e9, and what counters without a rule for the scan give."""
    total = account.operations.total
    adds = sorted(total.multiply_adds.items(), key=lambda item: -item[1])
    rows: list[Row] = [("operations", "1e9")]
    rows += [(f"multiply-adds, {kind}", giga(number)) for kind, number in adds if number]
    rows.append(("multiply-adds, all", giga(total.multiply_adds.total())))
    if total.without_scan != total.multiply_adds.total():
        rows.append(("multiply-adds as counters without the scan give them", giga(total.without_scan)))
    exponentials = sorted(total.exponentials.items(), key=lambda item: -item[1])
    rows += [(f"exponentials, {kind}", giga(number)) for kind, number in exponentials if number]
    return [*rows, ("elements written by all other operators", giga(total.other_elements))]


def layer_rows(account: Account) -> list[Row]:
    """Parameters, multiply-adds and exponentials layer by layer."""
    rows: list[Row] = [("stage", "layer", "parameters", "multiply-adds, 1e9", "scan, 1e9", "exponentials, 1e9")]
    for layer in account.layers:
        tally = layer.operations
        numbers = (tally.multiply_adds.total(), tally.multiply_adds["scan"], tally.exponentials.total())
        if layer.parameters or any(numbers):
            rows.append((layer.stage, layer.layer, f"{layer.parameters:,}", *map(giga, numbers)))
    return rows


def memory_rows(account: Account) -> list[Row]:
    """Activation memory, and time where it was measured."""
    return [
        ("activations, float32, one image", "MiB"),
        ("inference: peak of live tensors", mebibytes(account.memory.inference_bytes)),
        ("training: kept for the backward pass", mebibytes(account.memory.training_bytes)),
    ]


def errata_lines(account: Account) -> list[str]:
    """Numbers in print that are not those of the tensors, each with what explains it."""
    lines = []
    if (wrong := account.convolution_erratum) is not None:
        lines.append(
            f"Mamba's convolution is depthwise, {wrong.true_formula} = {wrong.true:,} parameters over all layers. The "
            f"report's {wrong.formula}, a full convolution, would give {wrong.printed:,}, and "
            f"{wrong.total_as_printed:,} in all instead of {wrong.total:,}."
        )
    if (seen := account.counter_erratum) is not None:
        dims = len(account.spatial)
        lines.append(
            f"The paper prints {seen.printed / 1e6:.2f} M in {dims}D. A counter that adds up the modules whose forward "
            "is called misses what Mamba's fused path reads directly (in_proj, conv1d, x_proj, dt_proj, out_proj, "
            "A_log, D), bare parameters and GroupNorm. Of this network it sees "
            f"{seen.seen:,} of {account.parameters.total:,}, which is not the printed number. Of the code as first "
            "uploaded (32 filters, the released layers, full convolutions for the depthwise ones) it sees "
            f"{seen.first_upload_seen:,}, {_verdict(seen.first_upload_seen, seen.printed)}; that network has "
            f"{seen.first_upload_total:,} parameters, and {giga(seen.first_upload_multiply_adds)} G multiply-adds are "
            f"seen of it for {seen.first_upload_setting}."
        )
    return lines


def _verdict(seen: int, printed: float) -> str:
    equal = round(seen / 1e6, 2) == round(printed / 1e6, 2)
    return "which is the printed number to its last digit" if equal else "which is not the printed number either"


def describe(account: Account) -> str:
    """Return the whole account as text."""
    size = " x ".join(map(str, account.spatial))
    options = "".join(f", {key} {value}" for key, value in account.options.items())
    lines = [
        f"{account.name}{options}: {size}, {account.in_channels} channel(s), {account.out_channels} classes",
        "",
        *aligned(source_rows(account), left=2),
        *([SYMBOLS] if account.parameters.closed_form else []),
        "",
        *aligned(grouped_rows(account, "stage")),
        "",
        *aligned(grouped_rows(account, "kind")),
        "",
        *aligned(layer_rows(account), left=2),
        "",
        *aligned(operation_rows(account)),
        *DEFINITIONS,
        "",
        *aligned(memory_rows(account)),
        f"({MEMORY_NOTE})",
    ]
    if (latency := account.latency) is not None:
        lines += [
            "",
            f"latency: {latency.seconds:.3f} s, median of {latency.repeats} passes ({latency.fastest:.3f} to "
            f"{latency.slowest:.3f}) on {latency.threads} CPU thread(s), as this machine runs it",
        ]
    if errata := errata_lines(account):
        lines += ["", "Errata", *(f"- {line}" for line in errata)]
    return "\n".join(lines)
