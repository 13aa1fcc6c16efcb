// The dtype codes that Python passes to every kernel.
#pragma once

#include <cstdint>

namespace safecrit {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

inline int64_t item_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace safecrit
