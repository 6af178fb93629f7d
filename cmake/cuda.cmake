# The CUDA back end: optional, found by its compiler. Kernels are compiled by a command of our own, so that the project stays one of C
# and its programs are linked by the C compiler; the static run-time is linked in, and finds the driver when it is first used.
#
# The objects go into the shared library and into the programs that ask for them; the installed archives are for the CPU, so that
# whoever links one needs nothing of CUDA (emxi_backend_cuda is a weak symbol).
set(cuda_objects "")
set(emx_cuda_works FALSE)
if(EMX_CUDA STREQUAL "ON" OR (EMX_CUDA STREQUAL "AUTO" AND NOT EMX_SANITIZE AND NOT EMX_FUZZ))
  find_program(EMX_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin PATHS /usr/local/cuda/bin)
  mark_as_advanced(EMX_NVCC)
  set(EMX_CUDA_ARCHITECTURES "compute_80,code=[compute_80,sm_80]" "compute_90a,code=sm_90a" CACHE STRING
    "What nvcc makes code for, as its -gencode arch= takes it")
  mark_as_advanced(EMX_CUDA_ARCHITECTURES)
  list(TRANSFORM EMX_CUDA_ARCHITECTURES PREPEND "-gencode=arch=" OUTPUT_VARIABLE cuda_targets)
  set(cuda_flags -O3 -std=c++17 ${cuda_targets} -Xcompiler=-fPIC,-fno-exceptions,-fno-threadsafe-statics,-fvisibility=hidden,-Wall
    -Wno-deprecated-gpu-targets)
  if(EMX_WERROR)
    list(APPEND cuda_flags -Werror=all-warnings)
  endif()
  if(EMX_NVCC)
    get_filename_component(cuda_bin "${EMX_NVCC}" DIRECTORY)
    find_path(EMX_CUDA_INCLUDE cuda_runtime_api.h HINTS "${cuda_bin}/../include" "${cuda_bin}/../targets/x86_64-linux/include")
    find_library(EMX_CUDART cudart_static HINTS "${cuda_bin}/.." PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib)
    mark_as_advanced(EMX_CUDA_INCLUDE EMX_CUDART)
  endif()
  if(EMX_NVCC AND EMX_CUDA_INCLUDE AND EMX_CUDART)
    # A compiler without the C++ compiler that it needs, or too old for a target, is none.
    set(probe ${PROJECT_BINARY_DIR}/cuda-probe)
    if(NOT EMX_CUDA_PROBED STREQUAL "${EMX_NVCC} ${cuda_flags}")
      file(WRITE ${probe}.cu "__global__ void probe(int *p) { *p = 1; }\n")
      execute_process(COMMAND ${EMX_NVCC} ${cuda_flags} -c ${probe}.cu -o ${probe}.o RESULT_VARIABLE probe_failed
        OUTPUT_VARIABLE probe_text ERROR_VARIABLE probe_text)
      if(NOT probe_failed)
        set(EMX_CUDA_PROBED "${EMX_NVCC} ${cuda_flags}" CACHE INTERNAL "the CUDA compiler and flags that work")
      endif()
    endif()
    if(EMX_CUDA_PROBED STREQUAL "${EMX_NVCC} ${cuda_flags}")
      set(emx_cuda_works TRUE)
    endif()
  endif()
  if(EMX_CUDA STREQUAL "ON" AND NOT emx_cuda_works)
    message(FATAL_ERROR "EMX_CUDA is ON, but nvcc, cuda_runtime_api.h or libcudart_static.a was not found or does not work here. ${probe_text}")
  endif()
endif()

if(emx_cuda_works)
  message(STATUS "CUDA back end: ${EMX_NVCC}")
  file(GLOB cuda_sources CONFIGURE_DEPENDS src/cuda/*.cu)
  foreach(source ${cuda_sources})
    get_filename_component(name ${source} NAME_WE)
    set(object ${PROJECT_BINARY_DIR}/cuda/${name}.o)
    add_custom_command(OUTPUT ${object} DEPENDS ${source} DEPFILE ${object}.d
      COMMAND ${CMAKE_COMMAND} -E make_directory ${PROJECT_BINARY_DIR}/cuda
      COMMAND ${EMX_NVCC} ${cuda_flags} -I${PROJECT_SOURCE_DIR}/include -MD -MF ${object}.d -MT ${object} -c ${source} -o ${object}
      COMMENT "Compiling src/cuda/${name}.cu" VERBATIM)
    list(APPEND cuda_objects ${object})
  endforeach()
  add_custom_target(cuda_kernels DEPENDS ${cuda_objects})
  file(GLOB cuda_host_sources CONFIGURE_DEPENDS src/cuda/*.c)
  add_library(entmax_cuda_host OBJECT ${cuda_host_sources})
  target_include_directories(entmax_cuda_host PRIVATE include src)
  target_include_directories(entmax_cuda_host SYSTEM PRIVATE ${EMX_CUDA_INCLUDE})
  target_link_libraries(entmax_cuda_host PUBLIC Threads::Threads)
else()
  message(STATUS "CUDA back end: none (EMX_CUDA is ${EMX_CUDA})")
endif()

# Puts the back end into a program or a shared library.
function(emx_with_cuda target)
  if(emx_cuda_works)
    add_dependencies(${target} cuda_kernels)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:entmax_cuda_host> ${cuda_objects})
    target_link_libraries(${target} PRIVATE ${EMX_CUDART} dl rt)
  endif()
endfunction()
