# The CUDA half of the build: whether there is one, for which GPUs, and how it is added to a library.
#
# The library holds the kernels of every architecture and cudart as a static library, and nothing of
# CUDA is looked for before a tensor on a GPU comes: it loads where there is no GPU and no CUDA.

set(cuda_archs "")
if(STATESCAN_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  set(with_cuda ${CMAKE_CUDA_COMPILER})
elseif(STATESCAN_CUDA)
  set(with_cuda ON)
else()
  set(with_cuda OFF)
endif()

# Hopper's GPUs all have the instructions of 9.0a, which plain 9.0 leaves out.
function(statescan_real_arch capability result)
  string(REPLACE "." "" arch "${capability}")
  string(REGEX REPLACE "^90$" "90a" arch "${arch}")
  set(${result} ${arch}-real PARENT_SCOPE)
endfunction()

# "8.0 9.0+PTX", as TORCH_CUDA_ARCH_LIST has it -> 80-real;90a-real;90-virtual
function(statescan_from_torch_archs list result)
  set(archs "")
  string(REPLACE " " ";" list "${list}")
  foreach(arch IN LISTS list)
    string(REGEX MATCH "^([0-9]+)\\.([0-9]+a?)(\\+PTX)?$" matched "${arch}")
    if(NOT matched)
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected numbers like 9.0 or 9.0+PTX, got ${arch}")
    endif()
    set(virtual ${CMAKE_MATCH_1}${CMAKE_MATCH_2}-virtual)
    statescan_real_arch("${CMAKE_MATCH_1}.${CMAKE_MATCH_2}" real)
    list(APPEND archs ${real})
    if(arch MATCHES "PTX")
      list(APPEND archs ${virtual})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES archs)
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

# The GPUs of this machine, by what nvidia-smi says of them.
function(statescan_native_archs result)
  set(archs "")
  find_program(nvidia_smi nvidia-smi)
  if(nvidia_smi)
    execute_process(COMMAND ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE found ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" found "${found}")
    foreach(capability IN LISTS found)
      statescan_real_arch(${capability} real)
      list(APPEND archs ${real})
    endforeach()
    list(REMOVE_DUPLICATES archs)
  endif()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

if(with_cuda)
  if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT "$ENV{CUDAARCHS}" STREQUAL "")
    set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
  elseif(NOT CMAKE_CUDA_ARCHITECTURES AND NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
    statescan_from_torch_archs("$ENV{TORCH_CUDA_ARCH_LIST}" CMAKE_CUDA_ARCHITECTURES)
  elseif(NOT CMAKE_CUDA_ARCHITECTURES OR CMAKE_CUDA_ARCHITECTURES STREQUAL "native")
    statescan_native_archs(CMAKE_CUDA_ARCHITECTURES)
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      # Ampere and its like, Hopper, and PTX for all that is newer.
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
    endif()
  endif()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12)
    message(FATAL_ERROR "statescan's CUDA kernels are C++20, which needs nvcc 12; this is "
                        "${CMAKE_CUDA_COMPILER_VERSION}. STATESCAN_CUDA=OFF builds without them.")
  endif()
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25, of Debian 12, does not know it of nvcc
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  string(REPLACE ";" " " cuda_archs "${CMAKE_CUDA_ARCHITECTURES}")
  message(STATUS "CUDA kernels: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${cuda_archs}")
else()
  message(STATUS "CUDA kernels: none, this build is for the CPU only")
endif()

function(statescan_add_cuda target)
  if(NOT cuda_archs)
    return()
  endif()
  find_package(CUDAToolkit REQUIRED)
  target_sources(${target} PRIVATE ${cuda_sources} csrc/bindings/stream.cpp)
  set_target_properties(${target} PROPERTIES
      CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static
      CUDA_VISIBILITY_PRESET hidden)
  target_compile_options(${target} PRIVATE
      "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall;-Xcompiler=-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>")
  target_include_directories(${target} SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  target_link_options(${target} PRIVATE -Wl,--exclude-libs,ALL)  # cudart's functions stay inside
  target_compile_definitions(${target} PRIVATE
      STATESCAN_CUDA="CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${cuda_archs}")
endfunction()
