//! Who holds which device, and how much of it. Pure: requests go in, grants and refusals come out; nothing is asked of any
//! driver. A grant is one lease, with as many holders as share it: the replicas of two generations during a reload.

use std::collections::BTreeMap;

use crate::wanted::{Preference, Wanted};

/// What the ledger knows of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Slot {
    name: String,
    memory_mb: u64,
    fenced: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Grant {
    /// Places of its devices.
    devices: Vec<usize>,
    /// What each holder has of each, in mebibytes; `None` for whole devices.
    holders: Vec<Option<u64>>,
}

impl Grant {
    /// What it has of each: as much as its largest holder.
    fn memory_mb(&self) -> Option<u64> {
        self.holders.iter().copied().reduce(|left, right| Some(left?.max(right?))).flatten()
    }
}

/// The book.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger {
    slots: Vec<Slot>,
    grants: BTreeMap<u64, Grant>,
    granted_ever: u64,
    /// Devices that are kept for a model, by place: others don't get them.
    reserved: BTreeMap<usize, String>,
}

/// Why nothing was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// No device here would ever do.
    NotHere,
    /// Others hold what would do.
    NotFree,
    /// A device is lost: nothing is granted until the process has been started anew.
    Lost,
}

impl Ledger {
    /// A book of these devices, by name and mebibytes of memory.
    pub(crate) fn new(devices: impl IntoIterator<Item = (String, u64)>) -> Self {
        let slot = |(name, memory_mb)| Slot { name, memory_mb, fenced: false };
        Self { slots: devices.into_iter().map(slot).collect(), ..Self::default() }
    }

    /// Grants a model the first preference that can be had now: its number, and the places of its devices.
    pub(crate) fn grant(&mut self, wanted: &Wanted, model: &str) -> Result<(u64, Vec<usize>), Refusal> {
        if self.slots.iter().any(|slot| slot.fenced) {
            return Err(Refusal::Lost);
        }
        let found = self.find(wanted, model);
        let Some(devices) = found else {
            let possible = |preference: &Preference| {
                self.fitting(preference, wanted.memory_mb).count() >= preference.count
            };
            let here = wanted.preferences.iter().any(possible);
            return Err(if here { Refusal::NotFree } else { Refusal::NotHere });
        };
        self.granted_ever += 1;
        let grant = Grant { devices: devices.clone(), holders: vec![wanted.memory_mb] };
        self.grants.insert(self.granted_ever, grant);
        Ok((self.granted_ever, devices))
    }

    /// Lets one more hold what was granted, where that is what it asks for.
    pub(crate) fn share(&mut self, number: u64, wanted: &Wanted) -> bool {
        let lost = self.slots.iter().any(|slot| slot.fenced);
        let Some(grant) = self.grants.get_mut(&number).filter(|_| !lost) else { return false };
        let fits = |preference: &Preference| {
            let names = || grant.devices.iter().map(|&place| &self.slots[place].name);
            preference.count == grant.devices.len() && names().all(|name| preference.fits(name))
        };
        let memory = match (wanted.memory_mb, grant.memory_mb()) {
            (Some(wanted), Some(granted)) => wanted <= granted,
            (wanted, granted) => wanted == granted,
        };
        let shares = memory && wanted.preferences.iter().any(fits);
        if shares {
            grant.holders.push(wanted.memory_mb);
        }
        shares
    }

    /// One holder less, who had so much; with the last one, the devices are free.
    pub(crate) fn release(&mut self, number: u64, memory_mb: Option<u64>) {
        let Some(grant) = self.grants.get_mut(&number) else { return };
        if let Some(at) = grant.holders.iter().position(|held| *held == memory_mb) {
            grant.holders.remove(at);
        }
        if grant.holders.is_empty() {
            self.grants.remove(&number);
        }
    }

    /// Whether a model would get what it asks for, were it not for these grants.
    pub(crate) fn has_room_without(&self, grants: &[u64], wanted: &Wanted, model: &str) -> bool {
        let mut without = self.clone();
        without.grants.retain(|number, _| !grants.contains(number));
        without.grant(wanted, model).is_ok()
    }

    /// Keeps the devices of a grant for a model, also when the grant has ended.
    pub(crate) fn reserve(&mut self, number: u64, model: &str) {
        for &place in self.grants.get(&number).into_iter().flat_map(|grant| &grant.devices) {
            self.reserved.insert(place, model.to_owned());
        }
    }

    /// Keeps nothing for it any more.
    pub(crate) fn end_reservation(&mut self, model: &str) {
        self.reserved.retain(|_, reserved| reserved != model);
    }

    /// Takes a device out for good. `false` where it was out already.
    pub(crate) fn fence(&mut self, place: usize) -> bool {
        !std::mem::replace(&mut self.slots[place].fenced, true)
    }

    /// Mebibytes that are spoken for; all of them where one lease has the whole device.
    pub(crate) fn leased_mb(&self, place: usize) -> u64 {
        let of = |grant: &Grant| grant.memory_mb().unwrap_or(self.slots[place].memory_mb);
        self.on(place).map(of).sum()
    }

    /// The numbers of the grants on a device.
    pub(crate) fn grants_on(&self, place: usize) -> impl Iterator<Item = u64> {
        self.grants.iter().filter(move |(_, grant)| grant.devices.contains(&place)).map(|(number, _)| *number)
    }

    fn on(&self, place: usize) -> impl Iterator<Item = &Grant> {
        self.grants.values().filter(move |grant| grant.devices.contains(&place))
    }

    /// Devices that would do if nobody held them.
    fn fitting(&self, preference: &Preference, memory_mb: Option<u64>) -> impl Iterator<Item = usize> {
        let would_do = move |slot: &Slot| {
            preference.fits(&slot.name) && memory_mb.is_none_or(|memory| memory <= slot.memory_mb)
        };
        self.slots.iter().enumerate().filter(move |(_, slot)| would_do(slot)).map(|(place, _)| place)
    }

    fn find(&self, wanted: &Wanted, model: &str) -> Option<Vec<usize>> {
        wanted.preferences.iter().find_map(|preference| self.free(preference, wanted.memory_mb, model))
    }

    /// Devices that a model can have now.
    fn free(&self, preference: &Preference, memory_mb: Option<u64>, model: &str) -> Option<Vec<usize>> {
        let is_for_it = |place: &usize| self.reserved.get(place).is_none_or(|reserved| reserved == model);
        let mut free: Vec<usize> = self
            .fitting(preference, memory_mb)
            .filter(|place| is_for_it(place) && self.has_room(*place, memory_mb))
            .collect();
        // The fullest first, so that what is empty stays whole for those who want all of it.
        free.sort_by_key(|&place| (std::cmp::Reverse(self.leased_mb(place)), place));
        free.truncate(preference.count);
        (free.len() == preference.count).then_some(free)
    }

    fn has_room(&self, place: usize, memory_mb: Option<u64>) -> bool {
        match memory_mb {
            None => self.on(place).next().is_none(),
            Some(memory) => {
                let whole = self.on(place).any(|grant| grant.memory_mb().is_none());
                !whole && self.leased_mb(place).saturating_add(memory) <= self.slots[place].memory_mb
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 3] = ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA L4"];
    const ASKED: [&str; 6] = ["any", "A100", "H100", "L4", "any:2", "A100:2"];

    fn wanted(preferences: &[&str], memory_mb: Option<u64>) -> Wanted {
        let preferences = preferences.iter().map(|text| text.parse().unwrap()).collect();
        Wanted { preferences, memory_mb }
    }

    fn book(devices: &[(&str, u64)]) -> Ledger {
        Ledger::new(devices.iter().map(|(name, memory)| ((*name).to_owned(), *memory)))
    }

    #[test]
    fn the_first_preference_that_is_free_is_taken() {
        let mut book = book(&[("NVIDIA L4", 24_000), ("NVIDIA A100", 80_000)]);
        let wanted = wanted(&["H100", "A100", "any"], None);
        assert_eq!(book.grant(&wanted, "model"), Ok((1, vec![1])));
        assert_eq!(book.grant(&wanted, "model"), Ok((2, vec![0])));
        assert_eq!(book.grant(&wanted, "model"), Err(Refusal::NotFree));
        book.release(1, None);
        assert_eq!(book.grant(&wanted, "model"), Ok((3, vec![1])));
    }

    #[test]
    fn what_is_not_here_is_told_from_what_is_taken() {
        let mut book = book(&[("NVIDIA A100", 80_000)]);
        assert_eq!(book.grant(&wanted(&["H100"], None), "model"), Err(Refusal::NotHere));
        assert_eq!(book.grant(&wanted(&["A100:2"], None), "model"), Err(Refusal::NotHere));
        assert_eq!(book.grant(&wanted(&["A100"], Some(80_001)), "model"), Err(Refusal::NotHere));
        book.grant(&wanted(&["A100"], None), "model").unwrap();
        assert_eq!(book.grant(&wanted(&["H100", "A100"], None), "model"), Err(Refusal::NotFree));
        assert_eq!(book.grant(&wanted(&["A100"], Some(1)), "model"), Err(Refusal::NotFree));
    }

    #[test]
    fn budgets_fill_a_device_before_the_next() {
        let mut book = book(&[("NVIDIA L4", 24_000), ("NVIDIA L4", 24_000)]);
        let (small, whole) = (wanted(&["L4"], Some(10_000)), wanted(&["L4"], None));
        assert_eq!(book.grant(&small, "model"), Ok((1, vec![0])));
        assert_eq!(book.grant(&small, "model"), Ok((2, vec![0])));
        assert_eq!(book.grant(&small, "model"), Ok((3, vec![1])));
        assert_eq!(book.grant(&whole, "model"), Err(Refusal::NotFree));
        book.release(3, Some(10_000));
        assert_eq!(book.grant(&whole, "model"), Ok((4, vec![1])));
    }

    #[test]
    fn a_lease_is_shared_by_those_who_would_have_got_it() {
        let mut book = book(&[("NVIDIA L4", 24_000)]);
        book.grant(&wanted(&["any"], Some(10_000)), "model").unwrap();
        assert!(book.share(1, &wanted(&["H100", "L4"], Some(9_000))));
        assert!(!book.share(1, &wanted(&["L4"], Some(10_001))));
        assert!(!book.share(1, &wanted(&["L4"], None)));
        assert!(!book.share(1, &wanted(&["A100"], Some(1))));
        assert!(!book.share(2, &wanted(&["any"], Some(1))));
        // The larger one leaves: what it had beyond the smaller one is free.
        book.release(1, Some(10_000));
        assert_eq!(book.leased_mb(0), 9_000);
        book.release(1, Some(9_000));
        assert_eq!(book.leased_mb(0), 0);
    }

    #[test]
    fn what_is_kept_for_one_model_is_given_to_no_other() {
        let mut book = book(&[("NVIDIA L4", 24_000)]);
        let wanted = wanted(&["any"], None);
        book.grant(&wanted, "model").unwrap();
        assert!(book.has_room_without(&[1], &wanted, "model"));
        assert!(!book.has_room_without(&[], &wanted, "model"));
        book.reserve(1, "model");
        book.release(1, None);
        assert_eq!(book.grant(&wanted, "other"), Err(Refusal::NotFree));
        assert!(book.grant(&wanted, "model").is_ok());
        book.release(2, None);
        book.end_reservation("model");
        assert!(book.grant(&wanted, "other").is_ok());
    }

    #[test]
    fn after_a_loss_nothing_is_granted() {
        let mut book = book(&[("NVIDIA L4", 24_000), ("NVIDIA L4", 24_000)]);
        book.grant(&wanted(&["any"], None), "model").unwrap();
        assert!(book.fence(1));
        assert!(!book.fence(1));
        assert_eq!(book.grant(&wanted(&["any"], None), "model"), Err(Refusal::Lost));
        assert!(!book.share(1, &wanted(&["any"], None)));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Grant(Vec<usize>, Option<u64>),
        Share(usize),
        Release(usize),
        Fence(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let memory = prop_oneof![Just(None), (1u64..30_000).prop_map(Some)];
        let asked = prop::collection::vec(0..ASKED.len(), 1..3);
        let step = prop_oneof![
            6 => (asked, memory).prop_map(|(asked, memory)| Step::Grant(asked, memory)),
            3 => any::<usize>().prop_map(Step::Share),
            5 => any::<usize>().prop_map(Step::Release),
            // Rarely: nothing is granted after it.
            1 => (0usize..40).prop_map(Step::Fence),
        ];
        prop::collection::vec(step, 1..80)
    }

    proptest! {
        /// Random loads, failures, swaps and losses, against a list of what each holder was told.
        #[test]
        fn no_device_is_leased_twice_no_budget_exceeded_and_no_lease_leaked(
            devices in prop::collection::vec((0..NAMES.len(), 1_000u64..40_000), 0..5),
            steps in steps(),
        ) {
            let named: Vec<(&str, u64)> = devices.iter().map(|(name, memory)| (NAMES[*name], *memory)).collect();
            let mut book = book(&named);
            // Each holder: its grant. Each grant: what it was told.
            let mut holders: Vec<u64> = Vec::new();
            let mut told: HashMap<u64, (Wanted, Vec<usize>)> = HashMap::new();
            let mut lost = false;
            for step in steps {
                match step {
                    Step::Grant(asked, memory_mb) => {
                        let asked: Vec<&str> = asked.iter().map(|place| ASKED[*place]).collect();
                        let wanted = wanted(&asked, memory_mb);
                        match book.grant(&wanted, "model") {
                            Ok((number, places)) => {
                                prop_assert!(!lost && !told.contains_key(&number));
                                let fits = wanted.preferences.iter().any(|preference| {
                                    preference.count == places.len()
                                        && places.iter().all(|place| preference.fits(named[*place].0))
                                });
                                prop_assert!(fits, "{wanted} got {places:?} of {named:?}");
                                holders.push(number);
                                told.insert(number, (wanted, places));
                            }
                            Err(Refusal::Lost) => prop_assert!(lost),
                            Err(Refusal::NotHere) => {
                                // Not even an empty machine has it.
                                let mut empty = tests::book(&named);
                                prop_assert_eq!(empty.grant(&wanted, "model"), Err(Refusal::NotHere));
                            }
                            Err(Refusal::NotFree) => prop_assert!(!holders.is_empty()),
                        }
                    }
                    Step::Share(which) if !holders.is_empty() => {
                        let number = holders[which % holders.len()];
                        let wanted = told[&number].0.clone();
                        let shared = book.share(number, &wanted);
                        prop_assert_eq!(shared, !lost, "what was granted can be shared until a device is lost");
                        if shared {
                            holders.push(number);
                        }
                    }
                    Step::Release(which) if !holders.is_empty() => {
                        let number = holders.swap_remove(which % holders.len());
                        book.release(number, told[&number].0.memory_mb);
                    }
                    Step::Fence(place) if place < named.len() => {
                        book.fence(place);
                        lost = true;
                    }
                    Step::Share(_) | Step::Release(_) | Step::Fence(_) => {}
                }
                for (place, (name, memory)) in named.iter().enumerate() {
                    let mut on: Vec<u64> = holders.iter().copied().filter(|number| told[number].1.contains(&place)).collect();
                    on.sort_unstable();
                    on.dedup();
                    let whole = on.iter().filter(|number| told[number].0.memory_mb.is_none()).count();
                    prop_assert!(whole == 0 || on.len() == 1, "{name} is leased whole, and again: {on:?}");
                    let budgets: u64 = on.iter().filter_map(|number| told[number].0.memory_mb).sum();
                    prop_assert!(budgets <= *memory, "{name} has {memory} MiB, {budgets} are promised");
                    prop_assert_eq!(book.grants_on(place).collect::<Vec<_>>(), on);
                }
            }
            for number in holders {
                book.release(number, told[&number].0.memory_mb);
            }
            prop_assert!(book.grants.is_empty(), "leaked: {:?}", book.grants);
        }
    }
}
