// pack / unpack for CPU tensors: one memcpy per sequence and field.

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "packing.h"

namespace grpo {
namespace {

template <typename T>
void repeat(char* out, const void* value, int64_t count) {
  T element;
  std::memcpy(&element, value, sizeof(T));
  std::fill_n(reinterpret_cast<T*>(out), count, element);
}

void repeat(char* out, const void* value, int64_t count, int64_t element_size) {
  switch (element_size) {
    case 1:
      return repeat<uint8_t>(out, value, count);
    case 2:
      return repeat<uint16_t>(out, value, count);
    case 4:
      return repeat<uint32_t>(out, value, count);
    default:
      return repeat<uint64_t>(out, value, count);
  }
}

void check_cu_seqlens(const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_tokens) {
  bool ascends = cu_seqlens[0] == 0 && cu_seqlens[num_sequences] == num_tokens;
  for (int64_t s = 0; s < num_sequences; ++s) ascends &= cu_seqlens[s] <= cu_seqlens[s + 1];
  if (ascends) return;
  throw std::invalid_argument("cu_seqlens must ascend from 0 to " + std::to_string(num_tokens) +
                              ", got " + std::to_string(cu_seqlens[0]) + " .. " +
                              std::to_string(cu_seqlens[num_sequences]));
}

}  // namespace

void pack_cpu(int64_t plan_address, int64_t num_fields, int64_t num_sequences, int64_t num_tokens) {
  const PlanView plan = view_plan(plan_address, num_fields, num_sequences);
  check_cu_seqlens(plan.cu_seqlens, num_sequences, num_tokens);
  for (int64_t f = 0; f < num_fields; ++f) {
    const Field& field = plan.fields[f];
    for (int64_t s = 0; s < num_sequences; ++s) {
      const int64_t begin = plan.cu_seqlens[s], count = plan.cu_seqlens[s + 1] - begin;
      if (count == 0) continue;
      char* out = reinterpret_cast<char*>(field.destination) + begin * field.element_size;
      const void* source = reinterpret_cast<const void*>(plan.sources[f * num_sequences + s]);
      if (field.kind == kPerToken) {
        std::memcpy(out, source, count * field.element_size);
      } else if (field.kind == kPerSequence) {
        repeat(out, source, count, field.element_size);
      } else if (field.kind == kPosition) {
        for (int64_t t = 0; t < count; ++t) reinterpret_cast<int64_t*>(out)[t] = t;
      } else {
        std::fill_n(reinterpret_cast<int32_t*>(out), count, static_cast<int32_t>(s));
      }
    }
  }
}

void unpack_cpu(const Unpack& job) {
  const auto* cu_seqlens = reinterpret_cast<const int32_t*>(job.cu_seqlens);
  check_cu_seqlens(cu_seqlens, job.num_sequences, job.num_tokens);
  const auto* packed = reinterpret_cast<const char*>(job.packed);
  char* row = reinterpret_cast<char*>(job.destination);
  for (int64_t s = 0; s < job.num_sequences; ++s) {
    const int64_t begin = cu_seqlens[s];
    const int64_t count = std::min<int64_t>(cu_seqlens[s + 1] - begin, job.row_length);
    if (count > 0) {
      std::memcpy(row, packed + begin * job.element_size, count * job.element_size);
    }
    repeat(row + count * job.element_size, &job.pad_bits, job.row_length - count, job.element_size);
    row += job.row_length * job.element_size;
  }
}

}  // namespace grpo
