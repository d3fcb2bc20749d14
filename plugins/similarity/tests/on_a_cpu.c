/* Runs top_k.cu on a CPU: each thread of a block is a thread of the machine. The kernel's text stands where KERNEL is. It compares each
   chunk of random scores with a sorted copy and prints how many places differ. */

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned x, y, z; } dim3;
static _Thread_local dim3 threadIdx;
static dim3 blockIdx, gridDim;
static pthread_barrier_t barrier;

#define __global__
#define __shared__ static
#define __syncthreads() pthread_barrier_wait(&barrier)
#define min(left, right) ((unsigned)(left) < (unsigned)(right) ? (unsigned)(left) : (unsigned)(right))

static float __int_as_float(unsigned bits) {
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

KERNEL

static float *scores, *best;
static unsigned *best_rows, rows, k;

static void *thread(void *number) {
    threadIdx.x = (unsigned)(size_t)number;
    top_k(scores, rows, k, best, best_rows);
    return NULL;
}

static const float *sorted_scores;

static int order(const void *left, const void *right) {
    unsigned one = *(const unsigned *)left, other = *(const unsigned *)right;
    float a = sorted_scores[one], b = sorted_scores[other];
    return a > b ? -1 : a < b ? 1 : one < other ? -1 : 1;
}

static unsigned check_block(void) {
    unsigned first = blockIdx.x * CHUNK, count = min(CHUNK, rows - first), wrong = 0;
    unsigned *expected = malloc(count * sizeof *expected);
    sorted_scores = scores + (size_t)blockIdx.y * rows;
    for (unsigned at = 0; at < count; at++) expected[at] = first + at;
    qsort(expected, count, sizeof *expected, order);
    size_t out = ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * k;
    for (unsigned place = 0; place < k; place++) {
        unsigned row = place < count ? expected[place] : NOBODY;
        wrong += best_rows[out + place] != row;
        wrong += row != NOBODY && best[out + place] != sorted_scores[row];
    }
    free(expected);
    return wrong;
}

int main(void) {
    unsigned wrong = 0, blocks = 0;
    srand(1);
    pthread_barrier_init(&barrier, NULL, THREADS);
    for (unsigned round = 0; round < 8; round++) {
        unsigned queries = 1 + (unsigned)rand() % 2;
        rows = round < 3 ? 1 + (unsigned)rand() % 60 : 1 + (unsigned)rand() % 9000;
        k = 1 + (unsigned)rand() % 100;
        gridDim = (dim3){(rows + CHUNK - 1) / CHUNK, queries, 1};
        scores = malloc((size_t)rows * queries * sizeof *scores);
        /* In every second round few different ones, so that many are the same. */
        for (size_t at = 0; at < (size_t)rows * queries; at++)
            scores[at] = round % 2 ? (float)(rand() % 50) : (float)rand() / 1e9f - 1.0f;
        size_t places = (size_t)gridDim.x * queries * k;
        best = malloc(places * sizeof *best);
        best_rows = malloc(places * sizeof *best_rows);
        for (unsigned block = 0; block < gridDim.x * queries; block++, blocks++) {
            pthread_t threads[THREADS];
            blockIdx = (dim3){block % gridDim.x, block / gridDim.x, 0};
            for (size_t number = 0; number < THREADS; number++)
                if (pthread_create(&threads[number], NULL, thread, (void *)number)) return 2;
            for (unsigned number = 0; number < THREADS; number++) pthread_join(threads[number], NULL);
            wrong += check_block();
        }
        free(scores), free(best), free(best_rows);
    }
    printf("%u wrong of %u blocks\n", wrong, blocks);
    return wrong != 0;
}
