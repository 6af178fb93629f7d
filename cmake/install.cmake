# What `cmake --install` puts where: libraries, headers, pkg-config files, the CMake package, the tool, its man pages, documentation.
# Everything is relative to the prefix, so an installed tree may be moved.

# libentmax_model finds libentmax beside it, whatever the prefix (CMAKE_SKIP_INSTALL_RPATH leaves that to the system's paths).
set_target_properties(entmax_model PROPERTIES INSTALL_RPATH "$ORIGIN")
install(TARGETS entmax entmax_model EXPORT shared INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS entmax_static entmax_model_static EXPORT static INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES include/emx.h include/emx_model.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS emx)
if(TARGET man)
  install(DIRECTORY ${PROJECT_BINARY_DIR}/man/ DESTINATION ${CMAKE_INSTALL_MANDIR}/man1 FILES_MATCHING PATTERN "*.1")
endif()
install(FILES LICENSE README.md CHANGELOG.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(DIRECTORY docs examples DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(DIRECTORY bench/results DESTINATION ${CMAKE_INSTALL_DOCDIR}/bench) # the raw rows that docs/performance.md names

# ---- CMake package: libentmax::entmax, libentmax::model; with COMPONENTS static also libentmax::entmax_static, ::model_static
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/libentmax)
configure_package_config_file(cmake/libentmaxConfig.cmake.in libentmaxConfig.cmake INSTALL_DESTINATION ${package_dir}
  NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(libentmaxConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/libentmaxConfig.cmake ${PROJECT_BINARY_DIR}/libentmaxConfigVersion.cmake DESTINATION ${package_dir})
install(EXPORT shared NAMESPACE libentmax:: FILE libentmaxTargets.cmake DESTINATION ${package_dir})
install(EXPORT static NAMESPACE libentmax:: FILE libentmaxStaticTargets.cmake DESTINATION ${package_dir})

# ---- pkg-config. The prefix is found from where the file lies; directories that a packager made absolute stay absolute.
file(RELATIVE_PATH up_to_prefix "${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig" "${CMAKE_INSTALL_PREFIX}")
string(REGEX REPLACE "/$" "" up_to_prefix "${up_to_prefix}")
foreach(dir LIBDIR INCLUDEDIR)
  if(IS_ABSOLUTE "${CMAKE_INSTALL_${dir}}")
    set(pc_${dir} "${CMAKE_INSTALL_${dir}}")
  else()
    set(pc_${dir} "\${prefix}/${CMAKE_INSTALL_${dir}}")
  endif()
endforeach()
# What a static link of the model library needs of the BLAS: its folder too where the linker does not look by itself.
get_filename_component(cblas_dir "${CBLAS_LIBRARY}" DIRECTORY)
set(pc_cblas "-lopenblas")
if(NOT cblas_dir IN_LIST CMAKE_C_IMPLICIT_LINK_DIRECTORIES)
  string(REPLACE " " "\\ " cblas_dir "${cblas_dir}")
  set(pc_cblas "-L${cblas_dir} -lopenblas")
endif()
foreach(library libentmax libentmax_model)
  configure_file(cmake/${library}.pc.in ${library}.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/${library}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endforeach()

# ---- cmake --build BUILD --target uninstall: removes what install_manifest.txt lists
if(PROJECT_IS_TOP_LEVEL)
  add_custom_target(uninstall COMMAND ${CMAKE_COMMAND} -DMANIFEST=${PROJECT_BINARY_DIR}/install_manifest.txt
    -P ${PROJECT_SOURCE_DIR}/cmake/uninstall.cmake VERBATIM)
endif()
