# librnp_cuda.so. RNP_CUDA=auto builds it where an nvcc is found that compiles for every architecture asked for with this
# host compiler; no GPU need be visible. RNP_CUDA=1 makes every reason not to build it an error. Sets, for build_info():
#   RNP_CUDA_COMPILER     "NVIDIA 13.0.88", or "" where the library is not built
#   RNP_CUDA_BUILT_ARCHS  "80;90a", or ""
#   RNP_CUDA_REASON       why it is not built, or ""
set(RNP_CUDA_COMPILER "")
set(RNP_CUDA_BUILT_ARCHS "")
set(RNP_CUDA_REASON "")

set(RNP_CUDA_SOURCES
    csrc/cuda/agent_kernels.cu
    csrc/cuda/agent_torch.cpp
    csrc/cuda/clamp_prefix.cu
    csrc/cuda/clamp_prefix_torch.cpp
    csrc/cuda/conv_tiles.cu
    csrc/cuda/plain_kernels.cu
    csrc/cuda/plan.cpp
    csrc/cuda/prefix_conv2d_torch.cpp
    csrc/cuda/weight_grad.cu
    csrc/cuda/weight_grad_torch.cpp)
# Compiled for sm_90a alone, where RNP_CUDA_ARCHS has it.
set(RNP_CUDA_SM90_SOURCES csrc/cuda/hopper_tiles.cu)

if(NOT RNP_CUDA MATCHES "^(auto|1|0)$")
  message(FATAL_ERROR "RNP_CUDA must be auto, 1 or 0, not '${RNP_CUDA}'")
endif()

if(RNP_CUDA STREQUAL "0")
  set(RNP_CUDA_REASON "switched off by RNP_CUDA=0")
else()
  if(DEFINED ENV{CUDACXX})
    set(RNP_NVCC "$ENV{CUDACXX}")
  else()
    find_program(RNP_NVCC NAMES nvcc HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" /usr/local/cuda/bin)
  endif()
  if(DEFINED ENV{CUDACXX} AND NOT EXISTS "${RNP_NVCC}")
    set(RNP_CUDA_REASON "there is no nvcc at CUDACXX=${RNP_NVCC}")
  elseif(NOT RNP_NVCC)
    set(RNP_CUDA_REASON "no nvcc found (looked in PATH, CUDA_HOME, CUDA_PATH and /usr/local/cuda; CUDACXX names one)")
  else()
    # One compile answers everything at once: whether nvcc runs, accepts this host compiler, and knows the architectures.
    set(probe "${CMAKE_BINARY_DIR}/nvcc_probe")
    file(WRITE "${probe}.cu" "#include <cuda_runtime.h>\n__global__ void probe(int* p) { *p = 0; }\n")
    set(flags "")
    foreach(arch IN LISTS RNP_CUDA_ARCHS)
      list(APPEND flags "-gencode=arch=compute_${arch},code=sm_${arch}")
    endforeach()
    execute_process(
      COMMAND "${RNP_NVCC}" -std=c++20 -ccbin "${CMAKE_CXX_COMPILER}" ${flags} -c "${probe}.cu" -o "${probe}.o"
      RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
    if(failed)
      string(REGEX REPLACE "[\r\n;\"\\]+" " " output "${output}")
      string(SUBSTRING "${output}" 0 300 output)
      set(RNP_CUDA_REASON "${RNP_NVCC} does not compile for ${RNP_CUDA_ARCHS}: ${output}")
    endif()
  endif()
endif()

if(RNP_CUDA_REASON)
  if(RNP_CUDA STREQUAL "1")
    message(FATAL_ERROR "RNP_CUDA=1 asks for the CUDA library, but: ${RNP_CUDA_REASON}")
  endif()
  message(STATUS "CUDA library: not built, ${RNP_CUDA_REASON}")
  return()
endif()

set(CMAKE_CUDA_COMPILER "${RNP_NVCC}")
set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
set(CMAKE_CUDA_ARCHITECTURES "${RNP_CUDA_ARCHS}")
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
set(RNP_CUDA_COMPILER "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")
set(RNP_CUDA_BUILT_ARCHS "${RNP_CUDA_ARCHS}")
message(STATUS "CUDA library: ${RNP_CUDA_COMPILER}, architectures ${RNP_CUDA_ARCHS}")

# The CUDA runtime is linked statically, so that the library needs only the driver. The current stream comes from libtorch_cuda at
# load time; that is why a build against a CPU-only torch leaves its symbol undefined, and why --no-as-needed keeps libtorch.so.
add_library(rnp_cuda SHARED ${RNP_CUDA_SOURCES})
set_target_properties(rnp_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static INSTALL_RPATH "" SKIP_BUILD_RPATH ON)
target_include_directories(rnp_cuda PRIVATE csrc ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(rnp_cuda PRIVATE rnp_torch)
if("90a" IN_LIST RNP_CUDA_ARCHS)
  add_library(rnp_cuda_sm90 OBJECT ${RNP_CUDA_SM90_SOURCES})
  set_target_properties(rnp_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES 90a)
  target_include_directories(rnp_cuda_sm90 PRIVATE csrc)
  target_link_libraries(rnp_cuda PRIVATE rnp_cuda_sm90)
  target_compile_definitions(rnp_cuda PRIVATE RNP_SM90=1)
else()
  target_compile_definitions(rnp_cuda PRIVATE RNP_SM90=0)
endif()
install(TARGETS rnp_cuda LIBRARY DESTINATION rnp_kernels)

# A tool for people at a GPU, built on demand; its header says how. Not in an sdist.
if("90a" IN_LIST RNP_CUDA_ARCHS AND EXISTS "${CMAKE_SOURCE_DIR}/bench/gpu_tiles.cu")
  add_executable(gpu_tiles EXCLUDE_FROM_ALL bench/gpu_tiles.cu csrc/cuda/conv_tiles.cu csrc/cuda/plain_kernels.cu csrc/cuda/plan.cpp)
  set_target_properties(gpu_tiles PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  target_include_directories(gpu_tiles PRIVATE csrc)
  target_link_libraries(gpu_tiles PRIVATE rnp_cuda_sm90)
  target_compile_definitions(gpu_tiles PRIVATE RNP_SM90=1)
endif()
