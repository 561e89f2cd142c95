// Table of contents of grpo_engine._C. Memory crosses as addresses (tensor.data_ptr()) and the
// stream as its handle; kernels/packing.py checks shapes, dtypes and devices before it calls.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "packing.h"
#include "planner.h"

namespace py = pybind11;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;
using Int64Array = py::array_t<int64_t, py::array::c_style>;

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++/CUDA part of GRPO Engine: batch planning, packing";
  m.attr("version") = GRPO_ENGINE_VERSION;
#ifdef GRPO_ENGINE_WITH_CUDA
  m.attr("built_with_cuda") = true;
  m.attr("cuda_architectures") = grpo::cuda_architectures();
#else
  m.attr("built_with_cuda") = false;
  m.attr("cuda_architectures") = std::vector<int>{};
#endif

  // planner.cpp
  m.def(
      "plan_batches",
      [](const Int64Array& lengths, int64_t max_tokens, int64_t num_ranks,
         const std::string& method, bool equal_counts) {
        const int64_t* values = lengths.data();
        const int64_t count = lengths.size();
        py::gil_scoped_release release;
        return grpo::plan_batches(values, count, max_tokens, num_ranks, method, equal_counts);
      },
      py::arg("lengths"), py::arg("max_tokens"), py::arg("num_ranks"), py::arg("method"),
      py::arg("equal_counts"));

  // packing_cpu.cpp, packing.cu; the layout of a plan is in packing.h
  m.attr("PER_TOKEN") = static_cast<int64_t>(grpo::kPerToken);
  m.attr("PER_SEQUENCE") = static_cast<int64_t>(grpo::kPerSequence);
  m.attr("POSITION") = static_cast<int64_t>(grpo::kPosition);
  m.attr("SEGMENT") = static_cast<int64_t>(grpo::kSegment);
  m.def("pack_cpu", &grpo::pack_cpu, py::arg("plan"), py::arg("num_fields"),
        py::arg("num_sequences"), py::arg("num_tokens"), ReleaseGil());
  py::class_<grpo::Unpack>(m, "Unpack")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>(),
           py::arg("destination"), py::arg("packed"), py::arg("num_tokens"), py::arg("cu_seqlens"),
           py::arg("num_sequences"), py::arg("row_length"), py::arg("element_size"),
           py::arg("pad_bits"));
  m.def("unpack_cpu", &grpo::unpack_cpu, py::arg("job"), ReleaseGil());
#ifdef GRPO_ENGINE_WITH_CUDA
  m.def("pack_cuda", &grpo::pack_cuda, py::arg("plan"), py::arg("num_fields"),
        py::arg("num_sequences"), py::arg("num_tokens"), py::arg("device"), py::arg("stream"),
        ReleaseGil());
  m.def("unpack_cuda", &grpo::unpack_cuda, py::arg("job"), py::arg("device"), py::arg("stream"),
        ReleaseGil());
#endif
}
