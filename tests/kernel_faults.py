"""What mutate_kernels.py seeds into the kernels: faults by hand, the tests that should notice, and faults that compute the same."""

TESTS = {  # file -> its narrow tests, the quickest to fail first
    "_class_rows": "class_logprob bucket_kl", "_classes": "class_logprob bucket_kl", "class_logprob": "class_logprob",
    "bucket_kl": "bucket_kl", "align_spans": "align_spans", "span_sum": "span_sum",
    "_chunks": "chunks linear_kl linear_logprob class_logprob", "_parallel": "parallel linear_logprob class_logprob",
    "_divergence": "token_kl linear_kl", "_kl_rows": "kl_rows token_kl parallel linear_kl", "linear_kl": "linear_kl parallel",
    "token_kl": "token_kl parallel", "_logprob_rows": "token_logprob linear_logprob", "linear_logprob": "linear_logprob",
    "token_logprob": "token_logprob", "linear_nll": "linear_nll", "_topk_rows": "topk_tail_kl tail_laws linear_topk_kl",
    "topk_tail_kl": "topk_tail_kl tail_laws", "linear_topk_kl": "linear_topk_kl", "renormalised_topk_kl": "renormalised_topk_kl",
    "teacher_topk": "teacher_topk", "teacher_sample": "teacher_sample", "_select_rows": "teacher_topk teacher_sample"}
GATE = "gate"  # instead of tests: what the interpreter cannot see, the compile gate must
BY_HAND = [  # file, old text (found once), new text, tests or None for the file's own
    ("_class_rows", "s = s * exp_diff(m, new) + tl.sum(exp_diff(a, new[:, None]), 1)\n        m = new\n    tl.store",
     "s = s + tl.sum(exp_diff(a, new[:, None]), 1)\n        m = new\n    tl.store", None),  # drop the rescale
    ("_class_rows", "tl.where(live, a, float(\"-inf\"))", "a", None),  # zero padding adds exp(0)
    ("_class_rows", "short = end - begin <= LONG", "short = end - begin < LONG", None),  # nobody sums a class of LONG ids
    ("_class_rows", "at < end[:, None]", "at <= end[:, None]", None),
    ("_class_rows", "tl.sum(s * exp_diff(m, M), 0)", "tl.sum(s, 0)", None),
    ("_class_rows", "(raw * inv_temp - M) - z", "raw * inv_temp - z", None),  # the shares are relative to the row's max
    ("_class_rows", "tl.where(dz == 0, 0.0, d)", "d", None),
    ("_class_rows", "inv_temp, inv_temp * grad_scale,", "inv_temp, grad_scale,", None),  # temperature factor
    ("_class_rows", "d *= 1.0 - (raw * inv_cap) * (raw * inv_cap)", "pass", None),  # softcap factor
    ("_class_rows", "t = tl.program_id(0).to(tl.int64)\n    M", "t = tl.program_id(0)\n    M", None),
    ("_class_rows", "merge_sums(top_CN, sums_CN, group)", "(top_CN, sums_CN)", "class_logprob"),
    ("_class_rows", "top_C = top_CN.amax(1)", "top_C = torch.zeros_like(top_CN[:, 0])", None),  # digits at large logits
    ("_classes", "torch.sort(class_V, stable=True)", "torch.sort(class_V, descending=True)", None),
    ("_classes", "outside = int((class_V < 0).sum())", "outside = 0", None),
    ("_classes", "(first_N1.diff() > _class_rows.LONG)", "(first_N1.diff() >= _class_rows.LONG)", None),
    ("_classes", "d.index_copy_(0, columns[0], d_L.to(like.dtype))", "d_L.to(like.dtype)", None),
    ("_classes", "all_sum(self.dhidden_TD, group) if", "self.dhidden_TD if", None),
    ("class_logprob", "value=-1", "value=1", None),
    ("class_logprob", "torch.where(logp_CN == -torch.inf, 0.0, g_TN[c].to(top_T.dtype))", "g_TN[c].to(top_T.dtype)", None),
    ("class_logprob", "dz_CN.masked_fill_(~log_s_T[c].isfinite()[:, None], 0.0)", "pass", None),
    ("bucket_kl", "coeff_T, kl_T = weight_T * t2,", "coeff_T, kl_T = weight_T,", None),
    ("bucket_kl", "kl_T.mul_(t2)", "pass", None),
    ("bucket_kl", "\"forward\": student.empty - teacher.empty", "\"forward\": teacher.empty - student.empty", None),
    ("bucket_kl", "temperature, teacher_group)", "temperature, student_group)", None),
    ("align_spans", "(longest + 1)", "longest", None),
    ("align_spans", "& (length > 0)", "", None),
    ("align_spans", "hit.long().cumsum(1) - hit.long()", "hit.long().cumsum(1)", None),
    ("align_spans", "torch.where(end[:, -1:] == last_B1, num_B1 - 1, -1)", "num_B1 - 1", None),
    ("span_sum", "| (span_T >= num_spans)", "", None),
    ("span_sum", "torch.sort(span_T, stable=True)", "torch.sort(span_T)", None),
    ("span_sum", "grad_S.new_zeros(1)", "grad_S.new_ones(1)", None),
    ("_chunks", "block[:, V:] = -torch.inf", "block[:, V:] = 0", None),  # zero padding adds exp(0)
    ("_chunks", "logits_CV += bias_V", "pass", None),
    ("_chunks", "logits_CV.mul_(logit_scale / softcap)", "logits_CV.mul_(1 / softcap)", None),
    ("_chunks", "dbias_V += dlogits_CV.sum(0, dtype=dbias_V.dtype)", "dbias_V = dlogits_CV.sum(0, dtype=dbias_V.dtype)", None),
    ("_chunks", "(1 / temperature, logit_scale) if softcap", "(1 / temperature, 1.0) if softcap", None),
    ("_chunks", "yield c if rows_M is None else rows_M[c]", "yield c", None),
    ("_chunks", "torch.autocast(hidden_CD.device.type, enabled=False)", "torch.autocast(hidden_CD.device.type, enabled=True)", None),
    ("_parallel", "max_C = all_max(local_max_C.clone(), group)", "max_C = local_max_C", "parallel"),
    ("_parallel", "torch.where(local_max_C == -torch.inf, 0.0, (local_max_C - max_C).exp())", "(local_max_C - max_C).exp()", "parallel"),
    ("_parallel", "max(0, min(rows, vocab_size - start))", "max(0, min(rows, vocab_size))", None),
    ("_divergence", "loss = tl.where(q == 0, 0.0, -q * diff)\n        g = -q", "loss = -q * diff\n        g = -q", "topk_tail_kl"),
    ("_divergence", "g = -q\n    elif", "g = q\n    elif", None),
    ("_divergence", "top = tl.where(top == float(\"-inf\"), 0.0, top)", "pass", None),
    ("_divergence", "return tl.where(x == float(\"-inf\"), 0.0, tl.exp(x - m))", "return tl.exp(x - m)", None),
    ("_divergence", "loss = g + tl.where(q == 0, 0.0, beta * q * (logq - logm))", "loss = g + tl.where(q == 0, 0.0, q * (logq - logm))", None),
    ("_kl_rows", "s_z = s_z * scale_z + tl.sum(e_z, 1)", "s_z = s_z + tl.sum(e_z, 1)", None),  # drop the rescale
    ("_kl_rows", "s_u = s_u * scale_u + tl.sum(e_u, 1)", "s_u = s_u + tl.sum(e_u, 1)", None),
    ("_kl_rows", "w = w * scale_u + ", "w = w + ", None),
    ("_kl_rows", "w = w * scale_z + ", "w = w + ", None),
    ("_kl_rows", "tl.store(out + 2 * C, tl.sum(s_z * scale_z, 0))", "tl.store(out + 2 * C, tl.sum(s_z, 0))", None),
    ("_kl_rows", "c = tl.load(coeff + t).to(WIDE) * mul_z", "c = tl.load(coeff + t).to(WIDE)", None),  # temperature factor
    ("_kl_rows", "d = c * (g - p * sum_g)", "d = g - p * sum_g", None),  # upstream factor
    ("_kl_rows", "d = c * (g - p * sum_g)", "d = c * g", None),
    ("_kl_rows", "d * (1.0 - (raw * inv_cap) * (raw * inv_cap))", "d", None),  # softcap factor
    ("_kl_rows", "if ok == 0:\n", "if False:\n", None),
    ("_kl_rows", "ok = ok & (tl.load(chosen + t) != 0)", "pass", "kl_rows"),
    ("_kl_rows", "side = 1 if mode == \"forward\" else 0", "side = 0", "parallel"),
    ("linear_kl", "coeff_T = weight_T * (t2 * gradient_scale)", "coeff_T = weight_T * gradient_scale", None),
    ("linear_kl", "torch.where(weight_T != 0, weight_T * kl_T, 0.0).sum()", "(weight_T * kl_T).sum()", None),
    ("linear_kl", "all_sum(dx_TD, group) if need_dhidden else dx_TD,\n            dhead", "dx_TD,\n            dhead", None),
    ("linear_kl", "(d * g_total if needed", "(d if needed", None),
    ("linear_kl", "kl_T.mul_(t2)", "pass", None),
    ("_logprob_rows", "s = s * scale + tl.sum(e, 1)", "s = s + tl.sum(e, 1)", None),
    ("_logprob_rows", "w = tl.where(scale > 0, scale * (w + s * (m - m_new)), 0.0)\n", "w = w * scale\n", None),  # entropy term
    ("_logprob_rows", "live = tl.maximum(live, tl.max((y != -1).to(tl.int32), 0))", "live = 1", None),
    ("_logprob_rows", "tl.where(y[:, None] == y_2[None, :], g_2[None, :], 0.0)", "tl.where((first + k)[:, None] == (other + k)[None, :], g_2[None, :], 0.0)", None),
    ("_logprob_rows", "d = g + p * c", "d = g", None),
    ("_logprob_rows", "tl.store(out + v, (d * inv_temp)", "tl.store(out + v, d", None),
    ("_logprob_rows", "tl.store(scratch + t * K + first + k, d * inv_temp", "tl.store(scratch + t * K + first + k, d", None),
    ("_logprob_rows", "tl.debug_barrier()  # dlogits may be", "pass  # dlogits may be", GATE),
    ("_logprob_rows", "tl.debug_barrier()\n    for first", "pass\n    for first", GATE),
    ("_logprob_rows", "peak_C = all_max(top_C.clone(), group) if group else top_C", "peak_C = top_C", "linear_logprob"),
    ("_logprob_rows", "mine_TK = (target_TK >= start) & (target_TK < start + width)", "mine_TK = target_TK >= start", "linear_logprob"),
    ("_topk_rows", "tl.store(row + y, tl.full((KB,), float(\"-inf\"), z.dtype.element_ty), mask=here)", "pass", None),  # the tail term
    ("_topk_rows", "s = s * exp_diff(m, m_new) + ", "s = s + ", None),
    ("_topk_rows", "loss += l_tail", "pass", None),
    ("_topk_rows", "G += g_tail", "pass", None),
    ("_topk_rows", "logq_tail = tl.where(n_live == V, float(\"-inf\"), logq_tail)", "pass", None),
    ("_topk_rows", "s += s_tail", "pass", None),
    ("_topk_rows", "c = tl.load(coeff + t).to(WIDE) * inv_temp", "c = tl.load(coeff + t).to(WIDE)", None),
    ("_topk_rows", "tl.debug_barrier()  # every read", "pass  # every read", GATE),
    ("_topk_rows", "tl.debug_barrier()\n    lanes", "pass\n    lanes", GATE),
    ("_topk_rows", "tl.debug_barrier()  # the sweep has", "pass  # the sweep has", GATE),
    ("renormalised_topk_kl", "acc += w_kd * x_d[None, :]", "acc = w_kd * x_d[None, :]", None),
    ("renormalised_topk_kl", "n // K", "n", None),
]
EQUIVALENT = {  # (file, line of source, old, new): why it computes the same
    ("_logprob_rows", "live = tl.maximum(live, tl.max((y != -1).to(tl.int32), 0))", "live = tl.maximum(live, tl.max((y != -1).to(tl.int32), 0))",
     "live = 1"): "an ignored row is then read in vain: the host puts zeros in its place, NaN in its logits included",
    ("span_sum", "sorted_T, order_T = torch.sort(span_T, stable=True)", "torch.sort(span_T, stable=True)", "torch.sort(span_T)"):
        "torch's CPU sort happens to be stable; on a GPU it is not",
    ("span_sum", "first = tl.load(offset + s, mask=s < S, other=0)", "<", "<="): "the lane behind the last span owns nothing and is not stored",
    ("_class_rows", "raw = tl.load(row + v, mask=v < V, other=float(\"-inf\")).to(WIDE)", "<", "<="):
        "what is read behind the row is not stored",
    ("renormalised_topk_kl", "if first < end:  # else nobody kept this id, and zeros are there already", "<", "<="):
        "an empty segment stores the zeros it started from",
    ("renormalised_topk_kl", "row = w + tl.where(y >= 0, y, 0).to(tl.int64)[:, None] * stride_v", "tl.where(y >= 0, y, 0)", "(y)"):
        "the address of a lane that the mask leaves out is not read",
    ("_divergence", "top = tl.where(top == float(\"-inf\"), 0.0, top)", "top = tl.where(top == float(\"-inf\"), 0.0, top)", "pass"):
        "NaN where neither has mass, which every use of the mix masks by p == 0 or q == 0",
    ("_topk_rows", "raw = tl.load(row + v, mask=v < V, other=float(\"-inf\")).to(WIDE)", "float(\"-inf\")", "0.0"):
        "topk_gradient: what is read behind the row is not stored",
    ("span_sum", "for start in range(0, tl.max(last - first, 0), STEP):", "-", "+"): "more steps, in which every lane is masked",
}
