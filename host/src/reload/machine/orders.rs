//! What somebody asked for: a reload or a rollback, one after the other.

use super::{Machine, OutcomeReply, Serving, State, plugin_source::PluginSource};
use crate::reload::history::{Cause, Outcome, Phase, Source};

/// Orders that wait for the change under way.
const ORDERS_MAX: usize = 1024;
/// Why a generation serves again that somebody went back to.
const ASKED_FOR: &str = "it was asked for";

/// What somebody asks for.
pub(in crate::reload) struct Order {
    pub(in crate::reload) what: What,
    pub(in crate::reload) reply: OutcomeReply,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::reload) enum What {
    /// Take what the volume holds, also where it is what serves.
    Reload,
    /// Go back to the generation before.
    RollBack,
}

impl Machine {
    pub(super) fn on_order(&mut self, order: Order) {
        let full = self.orders.len() >= ORDERS_MAX;
        match self.orders.back_mut() {
            // Those who ask for the same share one run of it.
            Some((What::Reload, waiting)) if order.what == What::Reload => waiting.push(order.reply),
            _ if full => {
                let mut candidate = self.candidate(Cause::Request, None);
                candidate.waiting.push(order.reply);
                let reason = format!("{ORDERS_MAX} reloads and rollbacks wait already; come back later");
                self.conclude(candidate, Outcome::Refused { phase: Phase::Build, reason });
            }
            _ => self.orders.push_back((order.what, vec![order.reply])),
        }
    }

    pub(super) async fn next_order(&mut self, mut state: State) -> State {
        while state.is_settled() {
            let Some((what, waiting)) = self.orders.pop_front() else {
                self.announce(&state);
                let last = self.history.last().cloned();
                // Whoever asked may have left.
                self.settled.drain(..).for_each(|reply| drop(reply.send(last.clone())));
                break;
            };
            state = match what {
                What::Reload => self.reload(state, waiting),
                What::RollBack => self.roll_back(state, waiting).await,
            };
        }
        state
    }

    fn reload(&mut self, state: State, waiting: Vec<OutcomeReply>) -> State {
        self.gone_back_from = None;
        self.builder.fence.lift(&self.model.name);
        let mut candidate = self.candidate(Cause::Request, None);
        candidate.waiting = waiting;
        match self.source.clone() {
            Some(Source { path, present: true }) => {
                self.give_up(state, Outcome::Superseded);
                self.build(candidate, PluginSource::File(path))
            }
            Some(Source { path, .. }) => {
                let reason = format!("expected the plugin at {}, and there is no file", path.display());
                self.refuse(candidate, Phase::Build, reason);
                state
            }
            None => {
                let reason = format!(
                    "no volume holds {plugin}.so or lib{plugin}.so",
                    plugin = self.model.spec().plugin
                );
                self.refuse(candidate, Phase::Build, reason);
                state
            }
        }
    }

    async fn roll_back(&mut self, state: State, waiting: Vec<OutcomeReply>) -> State {
        self.gone_back_from = self.serving_sha256().map(ToOwned::to_owned);
        if matches!(self.serving, Serving::OnProbation { .. }) {
            self.back_to_standby(ASKED_FOR.into(), Cause::Request, waiting).await;
            return state;
        }
        let mut candidate = self.candidate(Cause::Request, None);
        candidate.waiting = waiting;
        candidate.back = Some(ASKED_FOR.to_owned());
        match self.previous.pop() {
            Some(before) => {
                self.give_up(state, Outcome::Superseded);
                candidate.sha256 = Some(before.plugin.description().sha256().to_owned());
                // Its fleet may still be leaving, with threads that hang: they must have nothing in common with the new one.
                let generation = self.again(&before);
                self.load(candidate, generation).await
            }
            None => {
                let outcome = Outcome::Refused {
                    phase: Phase::RollBack,
                    reason: "there is no generation to go back to".into(),
                };
                self.conclude(candidate, outcome);
                state
            }
        }
    }
}
