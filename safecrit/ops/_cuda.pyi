MINIMUM_CAPABILITY: int

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
    skipped: int,
    device: int,
    stream: int,
) -> None: ...
def matrix_std_blocks(count: int) -> int: ...
def matrix_std(
    data: int,
    shape: list[int],
    strides: list[int],
    dtype: int,
    scratch: int,
    result: int,
    device: int,
    stream: int,
) -> None: ...
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
    device: int,
    stream: int,
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
    device: int,
    stream: int,
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
    device: int,
    stream: int,
) -> None: ...
