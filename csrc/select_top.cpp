// select_top on the CPU: usually one read.
//
// A sample gives two ranks between which the threshold lies almost surely. One pass keeps the entries above them and,
// with their ranks, the few between. It counts exactly, so it also tells whether the threshold is in fact between.
// If not, a wider range on the right side is tried, and after that the range comes from an exact histogram.
// Where too many entries would lie between, because many are equal, a single rank is tried instead: its entries are
// counted, and read again as far as they are selected.
#include "select_top.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "pages.h"
#include "select_args.h"
#include "select_scan.h"

namespace safecrit {
namespace {

using Ranks = std::vector<uint32_t>;

// Entries that may always be stored with their ranks, 8 bytes each; more only up to k, whose output has 8 bytes each.
constexpr int64_t kStored = int64_t{1} << 20;

struct Scores {
    const SelectTopArgs& args;
    std::vector<Filter> filters, tie_filters;  // by tensor
    static constexpr uint32_t greatest = kInfinity;

    explicit Scores(const SelectTopArgs& given) : args(given) {
        for (const Dtype dtype : args.dtypes) {
            filters.push_back(select_filter(dtype, false));
            tie_filters.push_back(select_filter(dtype, true));
        }
    }

    const void* at(size_t tensor, int64_t index) const {
        return static_cast<const char*>(args.data[tensor]) + index * item_size(args.dtypes[tensor]);
    }

    int filter(const Segment& segment, int64_t begin, int count, const Range<uint32_t>& range, uint32_t* positions,
               uint32_t* ranks, int64_t* ties) const {
        const Filter function = (range.only_counted ? tie_filters : filters)[segment.tensor];
        return function(at(segment.tensor, segment.start + begin), count, args.largest,
                        range.only_counted ? range.low + 1 : range.low, positions, ranks, ties);
    }
};

uint64_t mix(uint64_t value) {  // the finaliser of SplitMix64
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

// Ranks of runs of neighbouring entries, one run in each of `runs` equal shares of all the entries, at a place
// inside it that follows no pattern. NaN are left out.
class Sample {
public:
    Sample(const Scores& scores, int64_t total, const SelectTuning& tuning) {
        const std::vector<int64_t>& sizes = scores.args.sizes;
        const int64_t share = total / tuning.runs, rest = total % tuning.runs, length = std::min(tuning.run, share);
        std::vector<uint32_t> positions(kRoom), ranks(kRoom);
        ranks_.reserve(static_cast<size_t>(tuning.runs * length));
        size_t tensor = 0;
        int64_t before = 0, ties = 0;  // entries of the tensors before this one
        for (int64_t run = 0; run < tuning.runs; ++run) {
            const auto jitter = static_cast<int64_t>(mix(static_cast<uint64_t>(run) + 1) >> 1) % (share - length + 1);
            int64_t place = run * share + run * rest / tuning.runs + jitter;
            for (int64_t left = length; left > 0;) {
                while (place - before >= sizes[tensor]) before += sizes[tensor++];
                const int64_t index = place - before;
                const int64_t count = std::min({left, sizes[tensor] - index, int64_t{kBlock}});
                const int found =
                    scores.filters[tensor](scores.at(tensor, index), static_cast<int>(count), scores.args.largest, 0,
                                           positions.data(), ranks.data(), &ties);
                std::copy_if(ranks.begin(), ranks.begin() + found, std::back_inserter(ranks_),
                             [](uint32_t rank) { return rank <= kInfinity; });
                place += count;
                left -= count;
            }
            ends_.push_back(ranks_.size());
        }
        scale_ = static_cast<double>(tuning.runs * length) / static_cast<double>(total);
    }

    // Between these ranks lies the k-th greatest of all entries, unless the sample is out by more than `deviations`.
    Range<uint32_t> bracket(int64_t k, double deviations) const {
        if (ranks_.empty()) return {0, kInfinity, false};
        const double place = static_cast<double>(k) * scale_, size = static_cast<double>(ranks_.size());
        const double margin = deviations * std::sqrt(variance(rank_at(place), place)) + deviations * deviations / 2;
        return {place + margin > size ? 0 : rank_at(place + margin),
                place - margin < 1 ? kInfinity : rank_at(place - margin), false};
    }

    uint32_t guess(int64_t k) const { return ranks_.empty() ? 0 : rank_at(static_cast<double>(k) * scale_); }

    // The sampled rank nearest to `rank` that lies in the range.
    uint32_t nearest(uint32_t rank, const Range<uint32_t>& range) const {
        uint32_t next = range.high, last = range.low;
        bool found = false;
        for (const uint32_t own : ranks_) {
            if (own < range.low || own > range.high) continue;
            found = true;
            next = std::min(next, own);
            last = std::max(last, own);
        }
        if (rank >= range.low && rank <= range.high) return rank;
        if (!found) return rank < range.low ? range.low : range.high;
        return rank < range.low ? next : last;
    }

    int64_t expected_inside(const Range<uint32_t>& range) const {
        const auto inside = std::count_if(ranks_.begin(), ranks_.end(), [&](uint32_t rank) {
            return range.low <= rank && rank <= range.high;
        });
        return static_cast<int64_t>(static_cast<double>(inside) / scale_);
    }

private:
    // The rank at a place counted from the greatest, places outside taken as the first or the last.
    uint32_t rank_at(double place) const {
        const auto size = static_cast<int64_t>(ranks_.size());
        int64_t k = std::clamp(static_cast<int64_t>(std::ceil(place)), int64_t{1}, size);
        Ranks bins(size_t{1} << 12);
        for (const uint32_t rank : ranks_) ++bins[rank >> 19];
        size_t bin = bins.size() - 1;
        for (; k > bins[bin]; --bin) k -= bins[bin];
        Ranks sharing;
        std::copy_if(ranks_.begin(), ranks_.end(), std::back_inserter(sharing),
                     [&](uint32_t rank) { return rank >> 19 == bin; });
        return kth_greatest(sharing, k);
    }

    // Of the number of sampled entries with at least this rank: neighbours are alike, so it comes from the
    // differences between successive runs, but is no smaller than for independent entries.
    double variance(uint32_t rank, double place) const {
        double squares = 0, before = 0;
        size_t entry = 0;
        for (size_t run = 0; run < ends_.size(); ++run) {
            double high = 0;
            for (; entry < ends_[run]; ++entry) high += ranks_[entry] >= rank ? 1 : 0;
            if (run > 0) squares += (high - before) * (high - before) / 2;
            before = high;
        }
        return std::max(squares, place * std::max(0.0, 1 - place / static_cast<double>(ranks_.size())));
    }

    Ranks ranks_;
    std::vector<size_t> ends_;  // of the runs
    double scale_ = 1;          // sampled entries for each entry
};

using TopScan = Scan<uint32_t, Scores>;

// How many entries have a rank in [over.low, over.high], by (rank - over.low) >> shift, in `bins` bins; and in one more,
// the last, those ranked above.
std::vector<int64_t> count_ranks(const TopScan& scan, const Range<uint32_t>& over, int shift, size_t bins) {
    std::vector<std::vector<int64_t>> counts(static_cast<size_t>(scan.threads()));
    for (auto& part : counts) part.resize(bins + 1);
    scan.each_block(over, [&](size_t part, const uint32_t* ranks, int found) {
        for (int j = 0; j < found; ++j) {
            const size_t bin = ranks[j] > over.high ? bins : (ranks[j] - over.low) >> shift;
            ++counts[part][bin];
        }
    });
    for (size_t part = 1; part < counts.size(); ++part) {
        for (size_t bin = 0; bin <= bins; ++bin) counts[0][bin] += counts[part][bin];
    }
    return counts[0];
}

// Exact: the ranks that share their upper digit with the threshold, or where these are too many the threshold alone.
// Returns the number of reads. Sets low > high where fewer than k entries are not NaN.
int histogram_range(const TopScan& scan, int64_t k, int64_t most_inside, Range<uint32_t>& range, int64_t& nan) {
    constexpr int kLow = 15;
    int64_t here = 0;
    const auto crossing = [&](const std::vector<int64_t>& counts) {
        for (size_t bin = counts.size() - 1; bin-- > 0; k -= counts[bin]) {
            here = counts[bin];
            if (k <= here) return static_cast<int64_t>(bin);
        }
        return int64_t{-1};
    };
    const std::vector<int64_t> counts = count_ranks(scan, {0, kInfinity, false}, kLow, (kInfinity >> kLow) + 1);
    nan = counts.back();
    const int64_t upper = crossing(counts);
    if (upper < 0) {
        range = {1, 0, false};
        return 1;
    }
    const auto low = static_cast<uint32_t>(upper << kLow);
    range = {low, std::min(low + ((1u << kLow) - 1), kInfinity), false};
    if (here <= most_inside) return 1;
    const auto rank = low + static_cast<uint32_t>(crossing(count_ranks(scan, range, 0, size_t{1} << kLow)));
    range = {rank, rank, true};
    return 2;
}

int64_t check(const SelectTopArgs& args, const SelectTuning& tuning, int threads) {
    const auto refuse = [](const std::string& problem) { throw std::invalid_argument("select_top: " + problem); };
    const int64_t total = checked_total(args);
    if (threads < 1) refuse("threads must be at least 1");
    if (tuning.segment < 1 || tuning.segment > int64_t{1} << 30) refuse("segment must be 1 to 2^30");
    if (tuning.runs < 1 || tuning.run < 1 || tuning.runs > int64_t{1} << 24 || tuning.run > int64_t{1} << 24) {
        refuse("runs and run must be 1 to 2^24");
    }
    if (tuning.low > kInfinity || tuning.high > kInfinity || (tuning.high >= 0 && tuning.low > tuning.high)) {
        refuse("low and high must be ranks in order");
    }
    return total;
}

}  // namespace

SelectTopResult select_top_cpu(const SelectTopArgs& args, const SelectTuning& tuning, int threads) {
    const int64_t total = check(args, tuning, threads);
    std::fill_n(args.counts, args.sizes.size(), 0);
    const Scores scores(args);
    TopScan scan(scores, cut(args.sizes, tuning.segment), threads);
    if (args.k == 0) {
        scan.pass({kInfinity, kInfinity, true}, total, 0);
        return {true, 0, 0, 0, scan.invalid, 1};
    }
    prefer_huge_pages(args.out, static_cast<size_t>(args.k) * sizeof(int64_t));

    const int64_t most_inside = std::max(args.k, kStored);
    int passes = 0;
    const auto finished = [&] {
        const Threshold<uint32_t> found = scan.finish(args.k, args.out, args.counts);
        const uint32_t bits = args.largest ? found.rank : kInfinity - found.rank;
        return SelectTopResult{true, bits, found.tied, found.tied_selected, scan.invalid, passes};
    };
    const auto hit = [&](const Range<uint32_t>& range, int64_t most) {
        ++passes;
        // Above the range fewer than k: with k of them the threshold is one of theirs, and their ranks are not kept.
        return scan.pass(range, args.k - 1, most) && args.k <= scan.above + scan.inside;
    };
    if (total <= tuning.runs * tuning.run && tuning.low < 0) {
        if (hit({0, kInfinity, false}, total)) return finished();
        return {false, 0, 0, 0, scan.invalid, passes};
    }

    const Sample sample(scores, total, tuning);
    Range<uint32_t> possible{0, kInfinity, false};  // where the threshold lies for certain
    for (const double deviations : {4.0, 16.0}) {
        Range<uint32_t> range = sample.bracket(args.k, deviations);
        if (passes == 0 && tuning.low >= 0) {
            range = {static_cast<uint32_t>(tuning.low), static_cast<uint32_t>(std::max(tuning.low, tuning.high)), false};
        }
        range = {std::clamp(range.low, possible.low, possible.high),
                 std::clamp(range.high, possible.low, possible.high), false};
        if (sample.expected_inside(range) > most_inside / 4 * 3) {
            const uint32_t rank = sample.nearest(sample.guess(args.k), range);
            range = {rank, rank, true};
        }
        if (hit(range, most_inside)) return finished();
        if (scan.above >= args.k) {
            if (range.high == kInfinity) break;
            possible.low = range.high + 1;
        } else if (scan.inside <= most_inside || range.only_counted) {
            if (range.low == 0) break;
            possible.high = range.low - 1;
        }
    }
    Range<uint32_t> range{};
    int64_t nan = 0;
    passes += histogram_range(scan, args.k, most_inside, range, nan);
    if (range.low > range.high) return {false, 0, 0, 0, nan, passes};
    if (!hit(range, most_inside)) throw std::runtime_error("select_top: the scores changed while they were read");
    return finished();
}

std::vector<int64_t> rank_counts_cpu(const SelectTopArgs& args, uint32_t low, uint32_t high, int shift, int threads) {
    const SelectTuning tuning;
    check(args, tuning, threads);
    if (low > high || high > kInfinity) throw std::invalid_argument("rank_counts: low and high must be ranks in order");
    if (shift < 0 || shift > 30) throw std::invalid_argument("rank_counts: shift must be 0 to 30");
    const Scores scores(args);
    const TopScan scan(scores, cut(args.sizes, tuning.segment), threads);
    return count_ranks(scan, {low, high, false}, shift, ((high - low) >> shift) + 1);
}

}  // namespace safecrit
