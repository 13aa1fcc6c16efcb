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
