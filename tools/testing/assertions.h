// Included before all else in a build with assertions. A build without NDEBUG would have other
// layouts than the torch it runs beside (RecordFunction, which its headers construct), so the
// assertions of torch's headers are turned on one by one.
#pragma once

#include <c10/util/Exception.h>

#undef TORCH_INTERNAL_ASSERT_DEBUG_ONLY
#define TORCH_INTERNAL_ASSERT_DEBUG_ONLY(...) TORCH_INTERNAL_ASSERT(__VA_ARGS__)
