def variant() -> str: ...
def esi_accumulate(
    acc: int,
    grad: int,
    rows: int,
    cols: int,
    acc_row_stride: int,
    acc_col_stride: int,
    grad_row_stride: int,
    grad_col_stride: int,
    sigma: float,
    dtype: int,
    reduction: int,
    threads: int,
) -> int: ...
def matrix_std(matrices: list[tuple[int, list[int], list[int]]], dtype: int, threads: int) -> list[float]: ...
def sparse_adamw(
    weight: int,
    indices: int,
    grad: int,
    master: int,
    exp_avg: int,
    exp_avg_sq: int,
    numel: int,
    k: int,
    dtypes: tuple[int, ...],
    factors: tuple[float, ...],
    threads: int,
) -> None: ...
def gather(
    out: int,
    values: int,
    indices: int,
    numel: int,
    k: int,
    dtype: int,
    wide: bool,
    add: bool,
    threads: int,
) -> None: ...
def masked_adamw(
    weight: int,
    grad: int,
    exp_avg: int,
    exp_avg_sq: int,
    bits: int,
    numel: int,
    dtypes: tuple[int, ...],
    factors: tuple[float, ...],
    threads: int,
) -> None: ...
def bits_from_indices(indices: int, k: int, numel: int, bits: int, threads: int) -> None: ...
def count_bits(bits: int, bytes: int, threads: int) -> int: ...
def indices_from_bits(bits: int, bytes: int, indices: int, k: int, threads: int) -> None: ...
def read_memory(data: int, bytes: int, threads: int) -> int: ...
def rank_counts(
    data: list[int], sizes: list[int], dtypes: list[int], largest: bool, low: int, high: int, shift: int, threads: int
) -> list[int]: ...
def select_top(
    data: list[int],
    sizes: list[int],
    dtypes: list[int],
    k: int,
    largest: bool,
    out: int,
    counts: int,
    threads: int,
    *,
    segment: int = ...,
    runs: int = ...,
    run: int = ...,
    low: int = ...,
    high: int = ...,
) -> tuple[bool, int, int, int, int, int]: ...
def select_random(
    positions: list[int],
    sizes: list[int],
    k: int,
    seed: int,
    out: int,
    counts: int,
    threads: int,
) -> None: ...
