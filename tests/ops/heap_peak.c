// Counts what is on the heap, for test_memory.py: preloaded, it stands between a process and glibc's allocator.
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

static atomic_long bytes, most;

// From here on: what is there counts as nothing.
void heap_peak_start(void) {
  atomic_store(&bytes, 0);
  atomic_store(&most, 0);
}

long heap_peak(void) { return atomic_load(&most); }

static void* took(void* block) {
  if (block == NULL) return NULL;
  const long size = malloc_usable_size(block), now = atomic_fetch_add(&bytes, size) + size;
  long seen = atomic_load(&most);
  while (now > seen && !atomic_compare_exchange_weak(&most, &seen, now)) {
  }
  return block;
}

static void gave(void* block) {
  if (block != NULL) atomic_fetch_sub(&bytes, (long)malloc_usable_size(block));
}

void* malloc(size_t size) { return took(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) { return took(__libc_calloc(count, size)); }
void* memalign(size_t alignment, size_t size) { return took(__libc_memalign(alignment, size)); }
void* aligned_alloc(size_t alignment, size_t size) { return took(__libc_memalign(alignment, size)); }

int posix_memalign(void** block, size_t alignment, size_t size) {
  *block = took(__libc_memalign(alignment, size));
  return *block == NULL ? ENOMEM : 0;
}

void* realloc(void* block, size_t size) {
  gave(block);
  return took(__libc_realloc(block, size));
}

void free(void* block) {
  gave(block);
  __libc_free(block);
}
