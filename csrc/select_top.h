// select_top and select_random: the k entries of a list of tensors with the greatest ranks, ties to the smaller
// (tensor, index). A rank is made of |x| (select_filter.h) or is a hash of (tensor, index) (select_random.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace safecrit {

// How select_top looks for its threshold. Nothing here changes a result; tests use it to force rare paths.
struct SelectTuning {
    int64_t segment = int64_t{1} << 19;  // entries a thread takes at a time, at most 2^30
    int64_t runs = 4096, run = 64;       // the sample: runs of neighbouring entries
    int64_t low = -1, high = -1;         // ranks tried first instead of the sample's, where not negative
};

struct SelectTopArgs {
    std::vector<const void*> data;  // one for each tensor, contiguous
    std::vector<int64_t> sizes;     // entries
    std::vector<Dtype> dtypes;
    int64_t k;
    bool largest;
    int64_t* out;     // [k]: flat indices, tensor by tensor, ascending
    int64_t* counts;  // [tensors]: how many of them belong to each tensor
};

// enough: fewer than k entries are not NaN where it is false; nothing but nan is set then, nor with k = 0.
struct SelectTopResult {
    bool enough;
    uint32_t threshold_bits;
    int64_t tied, tied_selected, nan;
    int passes;  // reads of all the data, the sample and a second look at ties left out
};

// On the CPU with at most `threads` threads. Throws std::invalid_argument for arguments it cannot run with.
SelectTopResult select_top_cpu(const SelectTopArgs& args, const SelectTuning& tuning, int threads);

// How many entries have ranks low to high, counted by (rank - low) >> shift, and at the end how many rank above `high`:
// NaN, where `high` is that of infinity. Of `args`, k and the outputs are not used.
std::vector<int64_t> rank_counts_cpu(const SelectTopArgs& args, uint32_t low, uint32_t high, int shift, int threads);

// On a CUDA device. Nothing in SelectCudaTuning changes a result that is a hit.
struct SelectCudaTuning {
    bool exact = false;  // find the threshold by histograms of all entries first
    int64_t room = 0;    // entries that may be kept, at least k; 0: as many as are usual
    int64_t place = 0;   // of the floor in the sample, from the greatest; 0: the usual
};

// What is written at `result`, followed by args.counts. kHit: 1 if the selection was made. If not, run again with
// `exact`, and if it was `exact`, fewer than k entries are not NaN; nothing but kHit and kNan is set then.
enum SelectResult { kHit, kThresholdBits, kTied, kTiedSelected, kNan, kSelectResults };

int64_t select_top_cuda_scratch(const SelectTopArgs& args, const SelectCudaTuning& tuning);  // bytes

// Data, output, `result` and `scratch` (aligned to 16) in device memory; args.counts is not used. Queues everything
// on the stream and does not synchronise. Throws std::invalid_argument for arguments it cannot run with.
void select_top_cuda(const SelectTopArgs& args, const SelectCudaTuning& tuning, int64_t* result, void* scratch,
                     int device, void* stream);

// The k entries with the smallest hashes, of tensors numbered `positions` with `sizes` entries.
void select_random_cpu(const std::vector<uint64_t>& positions, const std::vector<int64_t>& sizes, int64_t k,
                       uint64_t seed, int64_t* out, int64_t* counts, int threads);

}  // namespace safecrit
