// What select_top and select_random share: one pass that keeps the entries ranked above a range of ranks and, with
// their ranks, those inside it; then the exact threshold from the few inside, and the indices in order.
//
// The tensors are cut into segments. A thread takes the next segment when it is done with one, so the order in which
// they are read varies; what is kept is found through the segment again, so the result does not.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "select_filter.h"
#include "threads.h"

namespace safecrit {

// Runs body(part) on `threads` threads; what one of them throws is thrown here.
template <typename Body>
void run_threads(int threads, const Body& body) {
    std::vector<std::exception_ptr> thrown(static_cast<size_t>(threads));
    parallel_for(threads, kElementsPerThread, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t part = begin; part < end; ++part) {
            try {
                body(static_cast<size_t>(part));
            } catch (...) {  // an exception that left a thread would end the process
                thrown[static_cast<size_t>(part)] = std::current_exception();
            }
        }
    });
    for (const auto& error : thrown) {
        if (error) std::rethrow_exception(error);
    }
}

// Entries [start, start + count) of one tensor, and what a pass found there.
struct Segment {
    size_t tensor;
    int64_t start, count;
    size_t part = 0, first_piece = 0, pieces = 0;  // where the kept entries lie
    int64_t above = 0, ties = 0;                   // entries ranked above the threshold, and equal to it
    int64_t quota = 0, place = 0;                  // ties to select, and where the first index goes
};

inline std::vector<Segment> cut(const std::vector<int64_t>& sizes, int64_t length) {
    std::vector<Segment> segments;
    for (size_t tensor = 0; tensor < sizes.size(); ++tensor) {
        for (int64_t start = 0; start < sizes[tensor]; start += length) {
            segments.push_back({tensor, start, std::min(length, sizes[tensor] - start)});
        }
    }
    return segments;
}

// The k-th greatest of `values`, 1 <= k <= their number.
template <typename Rank>
Rank kth_greatest(std::vector<Rank>& values, int64_t k) {
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<Rank>());
    return values[static_cast<size_t>(k - 1)];
}

template <typename Rank>
struct Range {
    Rank low, high;     // both inside
    bool only_counted;  // low == high: ties, counted but not stored
};

template <typename Rank>
struct Threshold {
    Rank rank;
    int64_t tied, tied_selected;
};

// A source has: greatest, the highest rank of an entry that may be selected; and
//   int filter(const Segment&, int64_t begin, int count, const Range<Rank>&, uint32_t* positions, Rank* ranks,
//              int64_t* ties)
// which writes, for entries [begin, begin + count) of the segment, position and rank of those inside or above the
// range (above only, where ties are counted), in order, and returns how many.
template <typename Rank, typename Source>
class Scan {
public:
    Scan(const Source& source, std::vector<Segment> segments, int threads)
        : source_(source), segments_(std::move(segments)) {
        int64_t total = 0;
        for (const Segment& segment : segments_) total += segment.count;
        const int64_t useful = std::min<int64_t>(static_cast<int64_t>(segments_.size()), total / kElementsPerThread);
        parts_.resize(static_cast<size_t>(std::max<int64_t>(1, std::min<int64_t>(threads, useful))));
    }

    int threads() const { return static_cast<int>(parts_.size()); }
    const std::vector<Segment>& segments() const { return segments_; }

    // One pass. It is given up, and false returned, once more than `most_above` entries lie above the range or more
    // than `most_inside` are stored from inside it.
    bool pass(const Range<Rank>& range, int64_t most_above, int64_t most_inside) {
        range_ = range;
        above = inside = invalid = 0;
        std::atomic<size_t> next{0};
        std::atomic<int64_t> all_above{0}, all_inside{0}, all_invalid{0};
        std::atomic<bool> stop{false};
        run_threads(threads(), [&](size_t part) {
            Part& mine = parts_[part];
            mine.clear();
            for (size_t i = next++; i < segments_.size() && !stop; i = next++) {
                Found found = read(segments_[i], part);
                all_invalid += found.invalid;
                const bool too_many = (all_above += found.above) > most_above;
                if (((all_inside += found.inside) > most_inside && !range.only_counted) || too_many) stop = true;
            }
        });
        above = all_above, inside = all_inside, invalid = all_invalid;
        return !stop;
    }

    // Calls body(positions, ranks, count) for what the filter finds, block by block, of the segments in any order.
    template <typename Body>
    void each_block(const Range<Rank>& range, const Body& body) const {
        std::atomic<size_t> next{0};
        run_threads(threads(), [&](size_t part) {
            Block block;
            for (size_t i = next++; i < segments_.size(); i = next++) {
                for (int64_t begin = 0; begin < segments_[i].count; begin += kBlock) {
                    const int found = block.fill(source_, segments_[i], begin, range);
                    body(part, block.ranks, found);
                }
            }
        });
    }

    // After a pass with above < k <= above + inside: the threshold, the k indices in `out`, tensor by tensor and
    // ascending, and their number for each tensor in `counts`.
    Threshold<Rank> finish(int64_t k, int64_t* out, int64_t* counts) {
        const Rank rank = range_.only_counted ? range_.low : kth_inside(k - above);
        std::atomic<size_t> next{0};
        run_threads(threads(), [&](size_t) {
            for (size_t i = next++; i < segments_.size(); i = next++) count(segments_[i], rank);
        });
        int64_t all_above = 0, tied = 0, place = 0;
        for (const Segment& segment : segments_) all_above += segment.above, tied += segment.ties;
        const int64_t tied_selected = k - all_above;
        int64_t left = tied_selected;
        for (Segment& segment : segments_) {
            segment.quota = std::min(left, segment.ties);
            segment.place = place;
            left -= segment.quota;
            place += segment.above + segment.quota;
            counts[segment.tensor] += segment.above + segment.quota;
        }
        next = 0;
        run_threads(threads(), [&](size_t) {
            for (size_t i = next++; i < segments_.size(); i = next++) write(segments_[i], rank, out);
        });
        return {rank, tied, tied_selected};
    }

    int64_t above = 0, inside = 0, invalid = 0;  // of the last pass; invalid: ranked above source.greatest

private:
    static constexpr int64_t kChunk = int64_t{1} << 18;    // entries of a chunk of kept entries
    static constexpr uint32_t kInside = 0x80000000u;       // in a kept position: its rank is kept too
    static constexpr int kDigit = 12;                      // bits

    struct Found {
        int64_t above = 0, inside = 0, invalid = 0;
    };

    // Kept entries of one segment that lie together: positions, flagged where a rank follows, and these ranks.
    struct Piece {
        uint32_t* positions;
        Rank* ranks;
        int64_t kept, ranked;
    };

    template <typename T>
    class Chunks {
    public:
        // Room for `count` entries after the last one that was taken; says whether it is elsewhere.
        bool reserve(int64_t count) {
            if (current_ > 0 && used_ + count <= kChunk) return false;
            if (current_ == chunks_.size()) chunks_.emplace_back(new T[kChunk]);
            ++current_;
            used_ = 0;
            return true;
        }
        T* end() { return chunks_[current_ - 1].get() + used_; }
        void take(int64_t count) { used_ += count; }
        void clear() { current_ = 0; }

    private:
        std::vector<std::unique_ptr<T[]>> chunks_;
        size_t current_ = 0;  // chunks in use
        int64_t used_ = 0;    // entries of the last one
    };

    struct Block {
        uint32_t positions[kRoom];
        Rank ranks[kRoom];
        int64_t ties = 0;

        int fill(const Source& source, const Segment& segment, int64_t begin, const Range<Rank>& range) {
            const int count = static_cast<int>(std::min<int64_t>(kBlock, segment.count - begin));
            return source.filter(segment, begin, count, range, positions, ranks, &ties);
        }
    };

    struct Part {
        Chunks<uint32_t> positions;
        Chunks<Rank> ranks;
        std::vector<Piece> pieces;
        std::unique_ptr<Block> block{new Block};

        void clear() {
            positions.clear();
            ranks.clear();
            pieces.clear();
        }
    };

    Found read(Segment& segment, size_t part) {
        Part& mine = parts_[part];
        Block& block = *mine.block;
        block.ties = 0;
        Found total;
        segment.part = part;
        segment.first_piece = mine.pieces.size();
        segment.above = 0;
        for (int64_t begin = 0; begin < segment.count; begin += kBlock) {
            const int found = block.fill(source_, segment, begin, range_);
            if (found == 0) continue;
            const bool positions_moved = mine.positions.reserve(found), ranks_moved = mine.ranks.reserve(found);
            if (positions_moved || ranks_moved || segment.first_piece == mine.pieces.size()) {
                mine.pieces.push_back({mine.positions.end(), mine.ranks.end(), 0, 0});
            }
            uint32_t* positions = mine.positions.end();
            Rank* ranks = mine.ranks.end();
            int64_t kept = 0, ranked = 0;
            for (int j = 0; j < found; ++j) {
                const Rank rank = block.ranks[j];
                const uint32_t ranks_inside = rank <= range_.high ? 1 : 0;
                positions[kept] = (static_cast<uint32_t>(begin) + block.positions[j]) | ranks_inside * kInside;
                ranks[ranked] = rank;
                kept += rank <= source_.greatest ? 1 : 0;
                ranked += ranks_inside;
            }
            mine.positions.take(kept);
            mine.ranks.take(ranked);
            mine.pieces.back().kept += kept;
            mine.pieces.back().ranked += ranked;
            total.above += kept - ranked;
            total.inside += ranked;
            total.invalid += found - kept;
        }
        segment.pieces = mine.pieces.size() - segment.first_piece;
        if (range_.only_counted) {
            segment.above = total.above;
            segment.ties = total.inside = block.ties;
        }
        return total;
    }

    // The k-th greatest rank inside the range: by one digit, then among the entries that share it.
    Rank kth_inside(int64_t k) {
        int shift = 0;
        while (static_cast<Rank>(range_.high - range_.low) >> shift >> kDigit) ++shift;
        const auto digit = [&](Rank rank) { return static_cast<size_t>((rank - range_.low) >> shift); };
        std::vector<std::vector<int64_t>> counts(parts_.size());
        run_threads(threads(), [&](size_t part) {
            counts[part].resize(size_t{1} << kDigit);
            for (const Piece& piece : parts_[part].pieces) {
                for (int64_t i = 0; i < piece.ranked; ++i) ++counts[part][digit(piece.ranks[i])];
            }
        });
        size_t bin = size_t{1} << kDigit;
        int64_t here = 0;
        do {
            k -= here;
            --bin;
            here = 0;
            for (const auto& part : counts) here += part[bin];
        } while (k > here);
        if (shift == 0) return range_.low + static_cast<Rank>(bin);
        std::vector<Rank> sharing;
        sharing.reserve(static_cast<size_t>(here));
        for (const Part& part : parts_) {
            for (const Piece& piece : part.pieces) {
                std::copy_if(piece.ranks, piece.ranks + piece.ranked, std::back_inserter(sharing),
                             [&](Rank rank) { return digit(rank) == bin; });
            }
        }
        return kth_greatest(sharing, k);
    }

    void count(Segment& segment, Rank threshold) const {
        if (range_.only_counted) return;
        segment.above = segment.ties = 0;
        for (size_t p = 0; p < segment.pieces; ++p) {
            const Piece& piece = parts_[segment.part].pieces[segment.first_piece + p];
            int64_t higher = 0, equal = 0;
            for (int64_t i = 0; i < piece.ranked; ++i) {
                higher += piece.ranks[i] > threshold ? 1 : 0;
                equal += piece.ranks[i] == threshold ? 1 : 0;
            }
            segment.above += piece.kept - piece.ranked + higher;
            segment.ties += equal;
        }
    }

    void write(const Segment& segment, Rank threshold, int64_t* out) const {
        int64_t* place = out + segment.place;
        int64_t quota = segment.quota;
        if (range_.only_counted && quota > 0) return write_again(segment, threshold, place);
        for (size_t p = 0; p < segment.pieces; ++p) {
            const Piece& piece = parts_[segment.part].pieces[segment.first_piece + p];
            const Rank* rank = piece.ranks;
            for (int64_t i = 0; i < piece.kept; ++i) {
                const uint32_t position = piece.positions[i];
                if (position & kInside) {
                    const Rank own = *rank++;
                    if (own < threshold || (own == threshold && quota-- <= 0)) continue;
                }
                *place++ = segment.start + (position & ~kInside);
            }
        }
    }

    // Ties were only counted: read the segment again for them.
    void write_again(const Segment& segment, Rank threshold, int64_t* place) const {
        const int64_t* const end = place + segment.above + segment.quota;
        int64_t quota = segment.quota;
        Block block;
        for (int64_t begin = 0; begin < segment.count && place < end; begin += kBlock) {
            const int found = block.fill(source_, segment, begin, {threshold, threshold, false});
            for (int j = 0; j < found && place < end; ++j) {
                const Rank rank = block.ranks[j];
                if (rank > source_.greatest || (rank == threshold && quota-- <= 0)) continue;
                *place++ = segment.start + begin + block.positions[j];
            }
        }
        if (place != end) throw std::runtime_error("select_top: the scores changed while they were read");
    }

    const Source& source_;
    std::vector<Segment> segments_;
    std::vector<Part> parts_;
    Range<Rank> range_{};
};

}  // namespace safecrit
