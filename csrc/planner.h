#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace grpo {

using Chunk = std::vector<int64_t>;            // sequence indices of one micro-batch
using Plan = std::vector<std::vector<Chunk>>;  // rank -> chunk -> index

// Throws std::invalid_argument (ValueError in Python) with the offending value.
Plan plan_batches(const int64_t* lengths, int64_t num_sequences, int64_t max_tokens,
                  int64_t num_ranks, const std::string& method, bool equal_counts);

}  // namespace grpo
