// Which sequences share a micro-batch, and on which rank.
//
// best_fit  DeepSeek-R1's scheme (arXiv 2501.12948v2, B.1): sort the global batch by length, deal
// it to
//           the data-parallel ranks, Best-Fit into chunks of max_tokens on each rank, make the
//           number of chunks equal on all ranks. The paper does not say how it deals (here: snake
//           order, which gives every rank one sequence of each length class) nor how it equalises
//           (here: the heaviest chunk is halved until the count is reached). Fewest chunks.
// lpt       Longest Processing Time first, for ranks and for chunks: each sequence to the lightest.
// kk        Karmarkar-Karp differencing, for ranks and for chunks. Best balance, most work.
//
// lpt and kk balance over the number of chunks that Best-Fit needs, and over a few more when their
// balance does not fit max_tokens. Everything is O(n log n); ties go to the lower index, so that
// all ranks compute the same plan from the same lengths.

#include "planner.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace grpo {
namespace {

using Lengths = const int64_t*;

// More than any cluster has; a plan holds a list for each rank, so a slip here is memory.
constexpr int64_t kMaxRanks = int64_t{1} << 20;

int64_t tokens_of(const Chunk& chunk, Lengths lengths) {
  int64_t tokens = 0;
  for (int64_t i : chunk) tokens += lengths[i];
  return tokens;
}

void sort_longest_first(Chunk& chunk, Lengths lengths) {
  std::sort(chunk.begin(), chunk.end(), [lengths](int64_t a, int64_t b) {
    return lengths[a] != lengths[b] ? lengths[a] > lengths[b] : a < b;
  });
}

// The three ways to spread `items` (longest first) over a fixed number of parts.

std::vector<Chunk> deal_in_snake_order(const Chunk& items, int64_t num_parts) {
  std::vector<Chunk> parts(num_parts);
  for (int64_t i = 0; i < static_cast<int64_t>(items.size()); ++i) {
    const int64_t round = i / num_parts, place = i % num_parts;
    parts[round % 2 == 0 ? place : num_parts - 1 - place].push_back(items[i]);
  }
  return parts;
}

std::vector<Chunk> balance_lpt(const Chunk& items, int64_t num_parts, Lengths lengths) {
  using Load = std::pair<int64_t, int64_t>;  // tokens, part
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> lightest;
  for (int64_t part = 0; part < num_parts; ++part) lightest.push({0, part});
  std::vector<Chunk> parts(num_parts);
  for (int64_t i : items) {
    const auto [tokens, part] = lightest.top();
    lightest.pop();
    parts[part].push_back(i);
    lightest.push({tokens + lengths[i], part});
  }
  return parts;
}

// Karmarkar-Karp, the largest differencing method for num_parts parts. A partial solution is a set
// of at most num_parts groups (missing groups are empty); the two solutions with the widest spread
// (heaviest minus lightest group) are merged, heaviest group of one with the lightest of the other,
// until one is left. Groups are a min-heap and the smaller solution is merged into the larger, so
// that absorbing a single sequence, which nearly every merge does, costs O(log num_parts).
class Differencing {
 public:
  Differencing(const Chunk& items, int64_t num_parts, Lengths lengths)
      : items_(items), num_parts_(num_parts), lengths_(lengths), next_(items.size(), -1) {}

  std::vector<Chunk> run() {
    std::vector<Chunk> parts(num_parts_);
    if (items_.empty()) return parts;
    Solution widest = take_widest();
    for (size_t num_left = items_.size(); num_left > 1; --num_left) {
      Solution second = take_widest();
      if (widest.groups.size() < second.groups.size()) std::swap(widest, second);
      absorb(widest, second);
      merged_.push_back(std::move(widest));
      std::push_heap(merged_.begin(), merged_.end(), narrower);
      widest = take_widest();
    }
    for (size_t part = 0; part < widest.groups.size(); ++part) {
      for (int64_t i = widest.groups[part].first; i != -1; i = next_[i]) {
        parts[part].push_back(items_[i]);
      }
    }
    return parts;
  }

 private:
  struct Group {  // a list of items, linked through next_
    int64_t tokens, first, last;
  };
  struct Solution {
    std::vector<Group> groups;  // min-heap on tokens
    int64_t heaviest, spread, oldest;
  };

  static bool heavier(const Group& a, const Group& b) {
    return std::tie(a.tokens, a.first) > std::tie(b.tokens, b.first);
  }
  static bool narrower(const Solution& a, const Solution& b) {
    return std::tie(a.spread, b.oldest) < std::tie(b.spread, a.oldest);
  }

  // The single sequences come in order of length, so only merged solutions need a heap.
  Solution take_widest() {
    if (num_singles_taken_ < items_.size()) {
      const int64_t tokens = lengths_[items_[num_singles_taken_]];
      if (merged_.empty() || tokens >= merged_.front().spread) {
        const auto i = static_cast<int64_t>(num_singles_taken_++);
        return {{{tokens, i, i}}, tokens, tokens, i};
      }
    }
    std::pop_heap(merged_.begin(), merged_.end(), narrower);
    Solution solution = std::move(merged_.back());
    merged_.pop_back();
    return solution;
  }

  // Precondition: `into` has at least as many groups as `from`.
  void absorb(Solution& into, Solution& from) {
    std::vector<Group>& groups = into.groups;
    std::sort(from.groups.begin(), from.groups.end(), heavier);
    // The lightest groups of `into` are its empty ones, then the top of its heap.
    const size_t num_into_empty = std::min(num_parts_ - groups.size(), from.groups.size());
    for (size_t i = num_into_empty; i < from.groups.size(); ++i) {
      std::pop_heap(groups.begin(), groups.end() - (i - num_into_empty), heavier);
    }
    for (size_t i = num_into_empty; i < from.groups.size(); ++i) {
      Group& lightest = groups[groups.size() - 1 - (i - num_into_empty)];
      next_[lightest.last] = from.groups[i].first;
      lightest = {lightest.tokens + from.groups[i].tokens, lightest.first, from.groups[i].last};
      into.heaviest = std::max(into.heaviest, lightest.tokens);
    }
    for (size_t i = from.groups.size(); i > num_into_empty; --i) {
      std::push_heap(groups.begin(), groups.end() - (i - 1 - num_into_empty), heavier);
    }
    for (size_t i = 0; i < num_into_empty; ++i) {
      into.heaviest = std::max(into.heaviest, from.groups[i].tokens);
      groups.push_back(from.groups[i]);
      std::push_heap(groups.begin(), groups.end(), heavier);
    }
    into.spread = into.heaviest - (groups.size() < num_parts_ ? 0 : groups.front().tokens);
    into.oldest = std::min(into.oldest, from.oldest);
  }

  const Chunk& items_;  // longest first
  const size_t num_parts_;
  const Lengths lengths_;
  std::vector<int64_t> next_;
  size_t num_singles_taken_ = 0;
  std::vector<Solution> merged_;  // max-heap on spread
};

std::vector<Chunk> balance_kk(const Chunk& items, int64_t num_parts, Lengths lengths) {
  if (num_parts == 1) return {items};
  return Differencing(items, num_parts, lengths).run();
}

using Balance = std::vector<Chunk> (*)(const Chunk&, int64_t, Lengths);

// Chunks of at most max_tokens.

// Best-Fit decreasing: into the open chunk whose free space is the smallest that suffices.
std::vector<Chunk> best_fit(const Chunk& items, int64_t max_tokens, Lengths lengths) {
  std::vector<Chunk> chunks;
  std::set<std::pair<int64_t, int64_t>> open;  // free tokens, chunk
  for (int64_t i : items) {
    const auto fit = open.lower_bound({lengths[i], 0});
    if (fit == open.end()) {
      open.insert({max_tokens - lengths[i], static_cast<int64_t>(chunks.size())});
      chunks.push_back({i});
      continue;
    }
    auto node = open.extract(fit);  // re-keyed in place, no allocation
    node.value().first -= lengths[i];
    chunks[node.value().second].push_back(i);
    open.insert(std::move(node));
  }
  return chunks;
}

std::vector<Chunk> balance_within(const Chunk& items, int64_t max_tokens, Lengths lengths,
                                  Balance balance) {
  int64_t num_chunks = best_fit(items, max_tokens, lengths).size();
  while (num_chunks > 0) {
    std::vector<Chunk> chunks = balance(items, num_chunks, lengths);
    const bool fits = std::all_of(chunks.begin(), chunks.end(), [&](const Chunk& chunk) {
      return tokens_of(chunk, lengths) <= max_tokens;
    });
    if (fits) return chunks;
    num_chunks += 1 + num_chunks / 64;  // ends: with a chunk for each sequence everything fits
  }
  return {};
}

// Halves the heaviest chunk that holds two sequences or more until there are `count` chunks. When
// none is left to halve, the rank gets empty chunks: it must still take part in the collective
// calls.
void split_until(std::vector<Chunk>& chunks, int64_t count, Lengths lengths) {
  std::priority_queue<std::pair<int64_t, int64_t>> heaviest;  // tokens, -chunk
  const auto offer = [&](int64_t c) {
    if (chunks[c].size() > 1) heaviest.push({tokens_of(chunks[c], lengths), -c});
  };
  for (int64_t c = 0; c < static_cast<int64_t>(chunks.size()); ++c) offer(c);
  while (static_cast<int64_t>(chunks.size()) < count && !heaviest.empty()) {
    const int64_t c = -heaviest.top().second;
    heaviest.pop();
    sort_longest_first(chunks[c], lengths);
    std::vector<Chunk> halves = balance_lpt(chunks[c], 2, lengths);
    chunks[c] = std::move(halves[0]);
    chunks.push_back(std::move(halves[1]));
    offer(c);
    offer(static_cast<int64_t>(chunks.size()) - 1);
  }
  chunks.resize(std::max(count, static_cast<int64_t>(chunks.size())));
}

// Heaviest chunk first: the peak of memory comes at once, and the c-th chunks of all ranks, which
// run side by side, are of like weight.
void sort_heaviest_first(std::vector<Chunk>& chunks, Lengths lengths) {
  std::vector<std::tuple<int64_t, int64_t, Chunk>> keyed;  // -tokens, first index, chunk
  keyed.reserve(chunks.size());
  for (Chunk& chunk : chunks) {
    sort_longest_first(chunk, lengths);
    const int64_t first = chunk.empty() ? INT64_MAX : chunk.front();
    const int64_t tokens = tokens_of(chunk, lengths);
    keyed.emplace_back(-tokens, first, std::move(chunk));
  }
  std::sort(keyed.begin(), keyed.end());
  for (size_t c = 0; c < chunks.size(); ++c) chunks[c] = std::move(std::get<2>(keyed[c]));
}

void check(Lengths lengths, int64_t num_sequences, int64_t max_tokens, int64_t num_ranks) {
  if (max_tokens < 1) {
    throw std::invalid_argument("max_tokens must be >= 1, got " + std::to_string(max_tokens));
  }
  if (num_ranks < 1 || num_ranks > kMaxRanks) {
    throw std::invalid_argument("num_ranks must be in 1 .. " + std::to_string(kMaxRanks) +
                                ", got " + std::to_string(num_ranks));
  }
  int64_t total = 0;
  for (int64_t i = 0; i < num_sequences; ++i) {
    if (lengths[i] >= 0 && lengths[i] <= max_tokens) {
      if (lengths[i] > INT64_MAX - total) {
        throw std::invalid_argument("lengths add up to 2^63 or more at lengths[" +
                                    std::to_string(i) + "] = " + std::to_string(lengths[i]));
      }
      total += lengths[i];
      continue;
    }
    throw std::invalid_argument(
        "lengths[" + std::to_string(i) + "] = " + std::to_string(lengths[i]) +
        (lengths[i] < 0 ? " is negative" : " exceeds max_tokens = " + std::to_string(max_tokens)));
  }
}

}  // namespace

Plan plan_batches(const int64_t* lengths, int64_t num_sequences, int64_t max_tokens,
                  int64_t num_ranks, const std::string& method, bool equal_counts) {
  check(lengths, num_sequences, max_tokens, num_ranks);
  if (method != "best_fit" && method != "lpt" && method != "kk") {
    throw std::invalid_argument("method must be 'best_fit', 'lpt' or 'kk', got '" + method + "'");
  }
  Chunk items(num_sequences);
  std::iota(items.begin(), items.end(), 0);
  sort_longest_first(items, lengths);

  const Balance balance = method == "kk" ? balance_kk : balance_lpt;
  std::vector<Chunk> per_rank = method == "best_fit" ? deal_in_snake_order(items, num_ranks)
                                                     : balance(items, num_ranks, lengths);
  Plan plan;
  size_t most_chunks = 0;
  for (Chunk& rank_items : per_rank) {
    sort_longest_first(rank_items, lengths);
    plan.push_back(method == "best_fit" ? best_fit(rank_items, max_tokens, lengths)
                                        : balance_within(rank_items, max_tokens, lengths, balance));
    most_chunks = std::max(most_chunks, plan.back().size());
  }
  for (std::vector<Chunk>& chunks : plan) {
    if (equal_counts) split_until(chunks, most_chunks, lengths);
    sort_heaviest_first(chunks, lengths);
  }
  return plan;
}

}  // namespace grpo
