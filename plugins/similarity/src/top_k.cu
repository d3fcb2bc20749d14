// The best k of each chunk of a query's scores. One block looks at one chunk of one query; the host merges the chunks.
//
// grid: x = chunks, y = queries; block: THREADS. Scores of one query lie one after the other, queries `rows` apart. Chunk c of query q
// writes to best[(q * chunks + c) * k ...]: the best first, of the same scores the lower row; what is left over has the row NOBODY.

#define THREADS 256
#define CHUNK 4096
#define NOBODY 0xFFFFFFFFu
// NVRTC brings no math.h.
#define LEAST __int_as_float(0xff800000)
#define TAKEN __int_as_float(0x7fffffff)

extern "C" __global__ void top_k(const float *scores, unsigned rows, unsigned k, float *best, unsigned *best_rows) {
    __shared__ float chunk[CHUNK];
    __shared__ float leader_score[THREADS];
    __shared__ unsigned leader_at[THREADS];

    const unsigned thread = threadIdx.x;
    const unsigned first = blockIdx.x * CHUNK;
    const unsigned count = min(CHUNK, rows - first);
    const float *own = scores + (size_t)blockIdx.y * rows + first;
    const size_t out = ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * k;

    for (unsigned at = thread; at < count; at += THREADS) {
        const float score = own[at];
        // No number is the least of all.
        chunk[at] = score == score ? score : LEAST;
    }
    __syncthreads();

    // Each thread leads with the best of every THREADS-th score; who wins looks for its next one. TAKEN, which is no number, marks what has won already.
    unsigned at = NOBODY;
    float score = LEAST;
    bool stale = true;
    for (unsigned place = 0; place < k; place++) {
        if (stale) {
            at = NOBODY;
            score = LEAST;
            for (unsigned other = thread; other < count; other += THREADS) {
                const float found = chunk[other];
                if (found == found && (at == NOBODY || found > score)) {
                    at = other;
                    score = found;
                }
            }
            stale = false;
        }
        leader_score[thread] = score;
        leader_at[thread] = at;
        __syncthreads();
        for (unsigned half = THREADS / 2; half > 0; half /= 2) {
            if (thread < half) {
                const unsigned mine = leader_at[thread], theirs = leader_at[thread + half];
                const float my_score = leader_score[thread], their_score = leader_score[thread + half];
                const bool better =
                    theirs != NOBODY && (mine == NOBODY || their_score > my_score || (their_score == my_score && theirs < mine));
                if (better) {
                    leader_score[thread] = their_score;
                    leader_at[thread] = theirs;
                }
            }
            __syncthreads();
        }
        const unsigned winner = leader_at[0];
        if (thread == 0) {
            best[out + place] = leader_score[0];
            best_rows[out + place] = winner == NOBODY ? NOBODY : first + winner;
        }
        if (winner != NOBODY && winner == at) {
            chunk[winner] = TAKEN;
            stale = true;
        }
        // Nobody writes its next leader before everybody has seen this winner.
        __syncthreads();
    }
}
